"""A demo in the browser: pictures, a folder, a film or a camera through both exits, and a slider
for the budget.

Runs on this machine alone, without a network: open the address that it prints. Ctrl+C ends it.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from dynamicdet_options import add_budget_arguments, positive


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--device', help='such as cpu or cuda:0; the best that is there')
    add_budget_arguments(parser)
    parser.add_argument('--report', help='report.html of tools/report.py, shown in a tab')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at: 127.0.0.1')
    parser.add_argument('--port', type=int, default=7860, help='port: 7860; 0 is any that is free')
    parser.add_argument(
        '--max-upload', type=positive, default=50, metavar='MB', help='size of a file, in MB: 50'
    )
    parser.set_defaults(cfg_options=None)
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.apis import DynamicInferencer
from dynamicdet.errors import UsageError
from dynamicdet.web.both_exits import BothExits
from dynamicdet.web.gradio_demo import build_app, open_socket, serve


def read_report(path: str | None) -> str | None:
    """A page of tools/report.py."""
    if path is None:
        return None
    try:
        content = Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the report '{path}' cannot be read: {error}") from error
    if '<html' not in content[:1000].lower():
        raise UsageError(f"'{path}' is no page: give the report.html that tools/report.py wrote")
    return content


def main() -> None:
    """Serve the demo."""
    args = parse_args()
    cli.prepare()
    report = read_report(args.report)
    listening = open_socket(args.host, args.port)
    if args.device:
        cli.require_device(args.device)
    cfg = cli.load_config(args)
    cli.require_checkpoint(args.checkpoint)
    detector = DynamicInferencer(
        cfg, args.checkpoint, args.device, show_progress=False, budget=cli.budget_from(args)
    )
    with tempfile.TemporaryDirectory(prefix='web_demo_') as folder:
        title = f'DynamicDet: {Path(args.config).stem}'
        app = build_app(BothExits(detector), title, Path(folder), args.max_upload * 10**6, report)
        if args.host not in ('127.0.0.1', '::1', 'localhost'):
            print('warning: whoever reaches this address can use the demo', file=sys.stderr)
        host = f'[{args.host}]' if ':' in args.host else args.host
        print(f'open http://{host}:{listening.getsockname()[1]} (Ctrl+C ends it)', flush=True)
        serve(app, listening)


if __name__ == '__main__':
    cli.run(main)

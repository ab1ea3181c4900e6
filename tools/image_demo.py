"""Detect in pictures: files, folders and URLs.

Writes pictures to OUT_DIR/vis and results, with difficulty and exit, to OUT_DIR/preds.
"""

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlparse

from dynamicdet_options import add_budget_arguments, positive


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('inputs', nargs='+', help='picture files, folders of them, URLs')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out-dir', default='outputs', help='where results go: outputs')
    parser.add_argument('--device', help='such as cpu or cuda:0; the best that is there')
    parser.add_argument('--batch-size', type=positive, default=1, help='pictures at a time: 1')
    parser.add_argument(
        '--pred-score-thr', type=float, default=0.3, help='draw boxes of at least this score: 0.3'
    )
    add_budget_arguments(parser)
    parser.add_argument('--no-save-vis', action='store_true', help='write no pictures')
    parser.add_argument('--no-save-pred', action='store_true', help='write no results')
    parser.add_argument(
        '--palette',
        default='none',
        choices=['coco', 'voc', 'citys', 'random', 'none'],
        help="colors of the boxes; by default the data set's",
    )
    parser.add_argument('--show', action='store_true', help='show each picture in a window')
    parser.add_argument('--print-result', action='store_true', help='print the results')
    parser.set_defaults(cfg_options=None)
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

import mmengine

from dynamicdet import cli
from dynamicdet.apis import DynamicInferencer
from dynamicdet.datasets.picture_formats import has_picture_suffix, picture_suffixes, pictures_in
from dynamicdet.errors import UsageError


def download(url: str, folder: Path) -> Path:
    """Get a picture; in a folder of its own, under a name that can be written again."""
    path = Path(unquote(urlparse(url).path))
    suffix = path.suffix if has_picture_suffix(path) else '.jpg'
    target = Path(tempfile.mkdtemp(dir=folder)) / f'{path.stem or "picture"}{suffix}'
    try:
        target.write_bytes(mmengine.fileio.get(url))
    except (OSError, ValueError) as error:
        raise UsageError(f"'{url}' cannot be fetched: {error}") from error
    return target


def find_pictures(inputs: list[str], folder: Path) -> dict[str, str]:
    """Path of each picture, to what its user calls it. Those of URLs are put into ``folder``."""
    pictures = {}
    for item in inputs:
        path = Path(item)
        if '://' in item:
            pictures[str(download(item, folder))] = item
        elif path.is_dir():
            inside = [str(path) for path in pictures_in(item)]
            pictures.update(zip(inside, inside))
        elif not path.is_file():
            raise UsageError(f"there is no picture or folder at '{item}'")
        elif not has_picture_suffix(path):
            raise UsageError(
                f"the name of '{item}' must end in one of {', '.join(picture_suffixes())}"
            )
        else:
            pictures[item] = item
    return pictures


def require_distinct(pictures: dict[str, str]) -> None:
    """Results are named after pictures: two of one name would leave one result."""
    ((stem, count),) = Counter(Path(path).stem for path in pictures).most_common(1)
    if count > 1:
        names = [name for path, name in pictures.items() if Path(path).stem == stem]
        raise UsageError(
            f'{" and ".join(names)} would write the same files: rename one, or give them to '
            'separate runs with an --out-dir each'
        )


def build_detector(args: argparse.Namespace) -> DynamicInferencer:
    """The detector that the options name."""
    cfg = cli.load_config(args)
    cli.require_checkpoint(args.checkpoint)
    if args.device:
        cli.require_device(args.device)
    return DynamicInferencer(
        cfg, args.checkpoint, args.device, palette=args.palette, budget=cli.budget_from(args)
    )


def detect(args: argparse.Namespace, pictures: dict[str, str]) -> int:
    """Detect in pictures, path -> name; 1 if some cannot be read, 2 if all."""
    faults = {}
    detector = build_detector(args)
    results = detector(
        list(pictures),
        batch_size=args.batch_size,
        show=args.show,
        no_save_vis=args.no_save_vis,
        pred_score_thr=args.pred_score_thr,
        print_result=args.print_result,
        no_save_pred=args.no_save_pred,
        out_dir=args.out_dir,
        on_unreadable=faults.__setitem__,
    )['predictions']
    for path, fault in faults.items():
        print(f"error: '{pictures[path]}' {fault}", file=sys.stderr)
    if not results:
        return 2
    saved = not (args.no_save_vis and args.no_save_pred)
    if detector.budget_report is not None:
        print(*detector.budget_report.lines(), sep='\n')
    print(
        f'{len(results)} images; ' + (f'results in {args.out_dir}' if saved else 'nothing written')
    )
    return 1 if faults else 0


def main() -> int:
    """Detect in pictures; 1 if some cannot be read, 2 if all."""
    args = parse_args()
    cli.prepare()
    # Of labels that reach over the edge and of a folder that is named elsewhere.
    warnings.filterwarnings('ignore', module='mmengine.visualization')
    with tempfile.TemporaryDirectory() as folder:
        pictures = find_pictures(args.inputs, Path(folder))
        if not (args.no_save_vis and args.no_save_pred):
            require_distinct(pictures)
        return detect(args, pictures)


if __name__ == '__main__':
    cli.run(main)

"""A demo on this machine, by Gradio: pictures, folders, films and a camera through both exits.

The server keeps nothing: an upload is removed once it was detected in, results are in the page
that asked for them, and the slider moves there (``viewer.js``). No other server is asked for
anything: what a page loads is this one's, and browsers are told to refuse the rest.
"""

import contextlib
import functools
import html
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import errors
from ..datasets.picture_formats import has_picture_suffix, picture_suffixes
from ..errors import UsageError
from .both_exits import MOST_PICTURES, BothExits, read_film, read_pictures
from .examples import example_pictures

#: Built-in pictures are drawn larger than detectors of them see them, for people.
_EXAMPLE_SIZE = 256
#: Where a page may load from: itself. Gradio's scripts are inline, and compile templates.
_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; "
    "frame-ancestors 'self'"
)
#: Seconds: uploads that nobody asks about, or that broke off, are removed when so old; how often
#: they are looked for.
_LEFT_OVER, _TIDIED = 600, 60
#: Visits that may wait for the detector; more are told to come again.
_WAITING = 32

_FOLDER = Path(__file__).parent
_MOUNT = """
const show = () => {
  if (element.dataset.ready !== 'yes') {
    element.dataset.ready = 'yes';
    element.viewer = DynamicViewer.mount(element.querySelector('.viewer'));
  }
  if (props.value) element.viewer.show(JSON.parse(props.value));
};
watch('value', show);
show();
"""


class Uploads:
    """What users sent, on its way to the detector.

    Args:
        exits (BothExits): The detector. One picture at a time, whoever asks.
        folder (Path): Where Gradio puts uploads; nothing outside is ever removed.
    """

    def __init__(self, exits: BothExits, folder: Path) -> None:
        self._exits, self._folder = exits, folder.resolve()
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def removed(self, paths: Sequence[str]) -> Iterator[None]:
        """Remove uploads at the end, whatever happens."""
        try:
            yield
        finally:
            for path in map(Path, paths):
                if path.resolve().is_relative_to(self._folder):
                    self._remove(path.resolve())

    def remove_left_over(self, seconds: float) -> None:
        """Remove files that were not written to for so long."""
        for home, _, names in os.walk(self._folder, topdown=False):
            for path in (Path(home, name) for name in names):
                # Others are removed meanwhile.
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > seconds:
                        self._remove(path)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        # Gradio makes a folder for each file.
        if path.parent != self._folder:
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    def tidy(self) -> None:
        """Do so from now on, in a thread of its own."""

        def look() -> None:
            while True:
                time.sleep(_TIDIED)
                self.remove_left_over(_LEFT_OVER)

        threading.Thread(target=look, daemon=True).start()

    def pictures(self, paths: Sequence[str]) -> dict[str, Any]:
        """A set of picture files; others are said to be none."""
        with self.removed(paths):
            by_name = sorted(paths, key=lambda path: Path(path).name)
            named = [path for path in by_name if has_picture_suffix(path)]
            faults = []
            if others := [Path(path).name for path in by_name if not has_picture_suffix(path)]:
                what = (
                    f'{others[0]} is no picture'
                    if len(others) == 1
                    else f'{len(others)} files are no pictures, such as {others[0]}'
                )
                faults = [f'{what}: names must end in one of {", ".join(picture_suffixes())}']
            if len(named) > MOST_PICTURES:
                faults.append(f'{len(named)} pictures: the first {MOST_PICTURES} are shown')
            return self._detect(read_pictures(named[:MOST_PICTURES]), faults)

    def film(self, paths: Sequence[str]) -> dict[str, Any]:
        """A set of frames of the first film."""
        with self.removed(paths):
            try:
                frames = [frame for path in paths[:1] for frame in read_film(path)]
            except UsageError as error:
                # It names the file by a path of this machine.
                return self._exits.shown([], [str(error).replace(f'{Path(paths[0]).parent}/', '')])
            return self._detect(frames, [])

    @functools.cached_property
    def _examples(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in example_pictures(_EXAMPLE_SIZE).items():
                (Path(folder) / name).write_bytes(content)
            return self._detect(read_pictures(sorted(Path(folder).iterdir())), [])

    def examples(self) -> dict[str, Any]:
        """A set of built-in pictures, detected in once."""
        return self._examples

    def _detect(self, pictures: Iterable, faults: list[str]) -> dict[str, Any]:
        with self._turn:
            return self._exits.detect_all(pictures, faults)


def build_app(
    exits: BothExits, title: str, folder: Path, most_bytes: int, report: str | None = None
) -> Any:
    """The demo as an ASGI application.

    Args:
        exits (BothExits): The detector.
        title (str): What is demonstrated.
        folder (Path): An empty folder for uploads, whose owner removes it.
        most_bytes (int): Size of an upload.
        report (str, optional): A page of tools/report.py, shown in a tab.

    Raises:
        UsageError: If Gradio is not installed.
    """
    # Read when Gradio is imported.
    os.environ.update(
        GRADIO_TEMP_DIR=str(folder),
        GRADIO_ANALYTICS_ENABLED='False',
        HF_HUB_DISABLE_TELEMETRY='1',
        HF_HUB_OFFLINE='1',
    )
    gradio = errors.import_optional('gradio', 'web demos', 'web')
    fastapi = errors.import_optional('fastapi', 'web demos', 'web')
    uploads = Uploads(exits, folder)
    uploads.tidy()
    blocks = _blocks(gradio, uploads, title, report is not None)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware('http')
    async def alone(request: Any, answer: Any) -> Any:
        response = await answer(request)
        response.headers['Content-Security-Policy'] = _POLICY
        response.headers['Referrer-Policy'] = 'no-referrer'
        return response

    if report is not None:

        @app.get('/report')
        def page() -> Any:
            return fastapi.responses.HTMLResponse(report)

    return gradio.mount_gradio_app(
        app,
        blocks,
        path='/',
        footer_links=[],
        max_file_size=most_bytes,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        theme=gradio.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
        css=(_FOLDER / 'viewer.css').read_text(encoding='utf-8') + _STYLE,
        head=f'<script>{(_FOLDER / "viewer.js").read_text(encoding="utf-8")}</script>',
    )


_STYLE = """
.gradio-container { max-width: 76rem !important; margin: 0 auto; }
.gradio-container h1 { overflow-wrap: anywhere; }
iframe.report { width: 100%; height: 80vh; border: 0; background: #fff; }
"""


def _blocks(gradio: Any, uploads: Uploads, title: str, has_report: bool) -> Any:
    """What is on the page, and what happens to uploads."""
    settings = dict(show_progress='full', concurrency_id='detector', concurrency_limit=1)
    settings['api_visibility'] = 'private'
    suffixes = list(picture_suffixes())
    with gradio.Blocks(title=title, analytics_enabled=False) as blocks:
        gradio.HTML(
            f'<h1>{html.escape(title)}</h1><p>Every picture goes through both exits once; the '
            'slider chooses. Uploads are removed once they were detected in.</p>'
        )
        with contextlib.ExitStack() as tab:
            if has_report:
                with gradio.Tabs():
                    ours, theirs = gradio.Tab('Detect'), gradio.Tab('Report')
                with theirs:
                    gradio.HTML(
                        '<iframe class="report" title="Report" src="report" '
                        'sandbox="allow-scripts"></iframe>'
                    )
                tab.enter_context(ours)
            with gradio.Tabs():
                with gradio.Tab('Pictures'):
                    pictures = gradio.File(
                        label='Pictures', file_count='multiple', file_types=suffixes, height=150
                    )
                with gradio.Tab('Folder'):
                    tree = gradio.File(
                        label='A folder of pictures', file_count='directory', height=150
                    )
                with gradio.Tab('Film'):
                    film = gradio.File(
                        label=f'A film: {MOST_PICTURES} of its frames',
                        file_types=['video'],
                        height=150,
                    )
                with gradio.Tab('Camera'):
                    camera = gradio.Image(
                        label='Camera', sources=['webcam'], type='filepath', height=300
                    )
                with gradio.Tab('Examples'):
                    examples = gradio.Button('Built-in pictures: handwritten digits')
            viewer = gradio.HTML(
                html_template='<div class="viewer"></div>',
                js_on_load=_MOUNT,
                elem_id='viewer',
                apply_default_css=False,
            )
        for box in (pictures, tree, film, camera):
            box.preprocess = _paths_of
        sources = ((pictures, uploads.pictures), (tree, uploads.pictures), (film, uploads.film))
        for box, detect in sources:
            # The box is emptied: its files are gone.
            box.upload(
                lambda paths, detect=detect: (json.dumps(detect(paths)), None),
                box,
                [viewer, box],
                **settings,
            )
        camera.input(lambda path: json.dumps(uploads.pictures(path)), camera, viewer, **settings)
        examples.click(lambda: json.dumps(uploads.examples()), None, viewer, **settings)
    return blocks.queue(max_size=_WAITING)


def _paths_of(payload: Any) -> list[str]:
    """Where Gradio has put uploads. Its own boxes would copy them, refuse some and leave all."""
    files = [] if payload is None else getattr(payload, 'root', [payload])
    return [file.path for file in files if file.path]


def open_socket(host: str, port: int) -> socket.socket:
    """A socket to listen at, or a `UsageError`: before a detector is loaded, which takes seconds.
    Port 0 is any that is free."""
    try:
        return socket.create_server((host, port), family=_family(host))
    except (OSError, OverflowError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UsageError(
            f'{host}:{port} cannot be listened at ({reason}): choose another with --port'
        ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ':' in host else socket.AF_INET


def serve(app: Any, listening: socket.socket) -> None:
    """Serve until Ctrl+C, or SIGTERM: then, too, what is open is closed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    uvicorn = errors.import_optional('uvicorn', 'web demos', 'web')
    config = uvicorn.Config(app, log_level='warning', timeout_graceful_shutdown=3)
    # It raises what ended it once more.
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])

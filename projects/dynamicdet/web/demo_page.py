"""A static page that runs a detector in the browser, from a folder of ``export.py --standalone``.

    index.html, page.css, page.js, viewer.css, viewer.js    as they are beside this file
    first.onnx, second.onnx, detector.json                  of the export
    ort.wasm.min.mjs, ort-wasm-simd-threaded.*              onnxruntime-web and its package.json
    examples.json, and the pictures that it names

It is written whole or not at all. A file server is all that it needs.
"""

import importlib
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..datasets.picture_formats import pictures_in
from ..deploy.folder import require_new, write_files
from ..deploy.graphs import need_for_deployment
from ..errors import UsageError
from .examples import example_pictures, knows_digits

#: The version that is fetched, with which the page was tried.
ONNXRUNTIME_WEB = '1.30.0'
#: What the page needs of it, WebAssembly alone: WebGPU would take another 12 MB.
_RUNTIME_FILES = ('ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm')
_PAGE_FILES = {
    'index.html': 'page.html',
    'page.css': 'page.css',
    'page.js': 'page.js',
    'viewer.css': 'viewer.css',
    'viewer.js': 'viewer.js',
}


def make_demo_page(
    export: str, out: str, runtime: str | None = None, examples: str | None = None
) -> int:
    """Write the page.

    Args:
        export (str): Folder of ``export.py --standalone``, of a dynamic detector.
        out (str): The folder to make.
        runtime (str, optional): onnxruntime-web's npm package, as a file or unpacked. By default
            npm fetches it.
        examples (str, optional): Folder of pictures to begin with. By default some of the built-in
            data, if the detector knows them.

    Returns:
        int: Bytes written.

    Raises:
        UsageError: If something is missing or does not fit.
    """
    require_new(out)
    detector = _export_files(export)
    classes = json.loads(detector['detector.json'])['classes']
    if examples is not None:
        if not Path(examples).is_dir():
            raise UsageError(f"there is no folder of pictures at '{examples}'")
        pictures = {path.name: path.read_bytes() for path in pictures_in(examples)}
    else:
        pictures = example_pictures() if knows_digits(classes) else {}
    # Beside the page, under names that are none of its own and no path in a URL.
    pictures = {
        f'example_{number}{Path(name).suffix}': content
        for number, (name, content) in enumerate(pictures.items(), 1)
    }
    here = Path(__file__).parent
    files = {name: (here / source).read_bytes() for name, source in _PAGE_FILES.items()}
    files |= detector | pictures | _runtime_files(runtime)
    files['examples.json'] = json.dumps(list(pictures)).encode()
    return write_files(out, files)


def _export_files(folder: str) -> dict[str, bytes]:
    """The graphs and the JSON file of an export, after they were looked through."""
    need_for_deployment('onnxruntime')
    standalone = importlib.import_module('dynamicdet.deploy.standalone_runtime')
    try:
        # It compares digests and builds the graphs.
        about = standalone.Detector(folder, threads=1).about
    except ValueError as error:
        raise UsageError(
            f'{error}; the page is made from a folder of tools/export.py --standalone'
        ) from error
    if len(about['graphs']) != 2:
        raise UsageError(
            f"'{folder}' has one graph: the page needs the two of a dynamic detector, which it "
            'chooses between'
        )
    names = (*about['graphs'], standalone.ABOUT)
    return {name: (Path(folder) / name).read_bytes() for name in names}


def _runtime_files(package: str | None) -> dict[str, bytes]:
    """What the page needs of onnxruntime-web, and the package.json that says whose it is."""
    if package is None:
        with tempfile.TemporaryDirectory() as folder:
            return _files_of_package(_fetch(folder))
    return _files_of_package(Path(package))


def _fetch(folder: str) -> Path:
    command = ['npm', 'pack', '--silent', f'onnxruntime-web@{ONNXRUNTIME_WEB}']
    remedy = (
        f'give its package {ONNXRUNTIME_WEB}, as a file of npm pack or unpacked, with --runtime'
    )
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        raise UsageError(
            f'npm, which fetches onnxruntime-web, is not installed: install Node.js, or {remedy}'
        ) from None
    except subprocess.TimeoutExpired:
        raise UsageError(f'npm cannot fetch onnxruntime-web in 10 minutes: {remedy}') from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
        raise UsageError(f'npm cannot fetch onnxruntime-web ({reason}): {remedy}')
    return next(Path(folder).glob('*.tgz'))


def _files_of_package(package: Path) -> dict[str, bytes]:
    wanted = {name: f'dist/{name}' for name in _RUNTIME_FILES}
    wanted['onnxruntime-web.package.json'] = 'package.json'
    try:
        if package.is_dir():
            found = {
                name: (package / path).read_bytes()
                for name, path in wanted.items()
                if (package / path).is_file()
            }
        else:
            found = _unpacked(package, wanted)
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"'{package}' cannot be read as an npm package: {error}") from error
    if missing := [wanted[name] for name in wanted if name not in found]:
        raise UsageError(
            f"'{package}' is no package of onnxruntime-web {ONNXRUNTIME_WEB}: it lacks {missing[0]}"
        )
    return found


def _unpacked(package: Path, wanted: Mapping[str, str]) -> dict[str, bytes]:
    """Files by name alone: nothing of an archive is written anywhere."""
    with tarfile.open(package) as archive:
        members = {member.name: member for member in archive if member.isfile()}
        return {
            name: archive.extractfile(members[f'package/{path}']).read()
            for name, path in wanted.items()
            if f'package/{path}' in members
        }

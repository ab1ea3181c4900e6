"""Files that appear whole or not at all, and the newest checkpoint of a run."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(content: bytes | Callable[[BinaryIO], None], path: str | Path) -> None:
    """Write bytes, or what a function writes, to a temporary neighbor, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'wb') as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a checkpoint is as readable as the user's others.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def latest_checkpoint(work_dir: str) -> str | None:
    """The newest whole checkpoint in a work dir, or None.

    mmengine's note of the last one is taken where it names a file; a kill may have come between.
    """
    note = Path(work_dir) / 'last_checkpoint'
    # It holds the path of when it was written; the folder may have moved.
    noted = Path(work_dir) / Path(note.read_text().strip() if note.is_file() else '').name
    if noted.is_file():
        return str(noted)
    files = [file for kind in ('epoch', 'iter') for file in Path(work_dir).glob(f'{kind}_*.pth')]
    return str(max(files, key=lambda file: file.stat().st_mtime)) if files else None

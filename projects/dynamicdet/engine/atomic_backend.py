"""Write checkpoints so that a killed run never leaves half of one."""
import os
import tempfile
from pathlib import Path
from typing import Union

from mmengine.fileio import LocalBackend, register_backend


class AtomicBackend(LocalBackend):
    """mmengine's local backend; a file appears under its name when it is whole, or not at all.

    Used by ``default_hooks.checkpoint.backend_args = dict(backend='atomic')``.
    """

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write bytes to a file.

        Args:
            obj (bytes): Content.
            filepath (str or Path): Where to; folders are made.
        """
        write_atomically(obj, filepath)


def write_atomically(content: bytes, path: Union[str, Path]) -> None:
    """Write to a temporary neighbour, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(content)
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


register_backend('atomic', AtomicBackend, force=True)

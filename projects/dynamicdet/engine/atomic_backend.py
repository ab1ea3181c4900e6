"""Write checkpoints so that a killed run never leaves half of one."""

from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from ..files import write_atomically


class AtomicBackend(LocalBackend):
    """mmengine's local backend; a file appears under its name when it is whole, or not at all.

    Used by ``default_hooks.checkpoint.backend_args = dict(backend='atomic')``.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file.

        Args:
            obj (bytes): Content.
            filepath (str or Path): Where to; folders are made.
        """
        write_atomically(obj, filepath)


register_backend('atomic', AtomicBackend, force=True)

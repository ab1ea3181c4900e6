"""Parts of a record on disk, so that a run that was stopped goes on where it was."""

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch.utils.data import DataLoader

from ..errors import UsageError
from ..routing.record import RoutingRecord, join_records, read_record, write_record

#: Images that are held back until they are a part of their own: what a stopped run loses at most,
#: but for the rest of a batch.
_PART = 64


class RecordParts:
    """The images of a record so far, in order.

    Args:
        folder (str or Path, optional): Of these parts alone: what lies there is taken over, up to
            the first part that is missing or damaged. Who gives it knows that they are of the same
            detector and data. Defaults to None: in memory.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._parts: list[RoutingRecord] = []
        self._waiting: list[dict] = []
        for number in itertools.count() if self.folder else ():
            try:
                self._parts.append(read_record(self._path(number)))
            except UsageError:
                break

    @property
    def images(self) -> int:
        """How many images there are."""
        return sum(map(len, self._parts)) + len(self._waiting)

    def add(self, images: Iterable[dict]) -> None:
        """Add a batch of images, see `RoutingRecord.from_images`; they are written when they are
        enough for a part."""
        self._waiting += images
        if len(self._waiting) >= _PART:
            self._write()

    def join(self) -> RoutingRecord:
        """All images as one record; costs are 0, since they are of all images."""
        if self._waiting:
            self._write()
        return join_records(self._parts)

    def remove(self) -> None:
        """Remove what is on disk."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self) -> None:
        zeros = [0.0] * len(self._waiting[0]['detections'])
        part = RoutingRecord.from_images(self._waiting, zeros, zeros)
        if self.folder:
            write_record(part, self._path(len(self._parts)))
        self._parts.append(part)
        self._waiting = []

    def _path(self, number: int) -> Path:
        return self.folder / f'{number:06d}.npz'


def batches_from(loader: DataLoader, images: int) -> DataLoader:
    """A loader's batches behind the first so many images, which are not read; the same batches,
    since what an image is padded with depends on them.

    Raises:
        UsageError: If a batch ends elsewhere.
    """
    if not images:
        return loader
    batches = list(loader.batch_sampler)
    starts = [0, *itertools.accumulate(map(len, batches))]
    if images not in starts:
        raise UsageError('parts of a record end inside a batch: remove them, and record anew')
    return DataLoader(
        loader.dataset,
        batch_sampler=batches[starts.index(images) :],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
    )

"""The table of results, in part files until all are there.

    results.parquet           a row for each picture, in the order of the sources
    results.parquet.parts/    while it is made
        plan.json             what is detected in, and how
        part-000000.parquet   rows of some pictures; whole, or not there
        lock                  held by the run that writes

A run that was killed goes on with the parts that are missing.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UsageError, import_optional
from ..files import write_atomically
from .passes import Row
from .sources import Picture

#: Where the table says what it is of.
_ABOUT = b'dynamicdet'


def require_arrow() -> None:
    """Raise a `UsageError` where the library of tables is missing."""
    import_optional('pyarrow', 'tables', 'bulk')


def _schema():
    import pyarrow as pa

    return pa.schema(
        [
            ('picture', pa.string()),
            ('width', pa.int32()),
            ('height', pa.int32()),
            ('difficulty', pa.float32()),
            ('exit', pa.int8()),
            # Left, top, right, bottom, in pixels.
            ('boxes', pa.list_(pa.list_(pa.float32(), 4))),
            ('labels', pa.list_(pa.int32())),
            ('scores', pa.list_(pa.float32())),
            ('error', pa.string()),
        ]
    )


class ResultTable:
    """A table that is being made. Use it in a ``with`` block: one run at a time.

    Args:
        out (str or Path): The Parquet file to make.
        pictures (Sequence[Picture]): All of them.
        settings (Mapping): What results hang on: plain data. A run with others does not go on.
        part_size (int): Pictures of a part: what is done again after a kill. Defaults to 64.

    Attributes:
        complete (bool): Whether the file is there already, of these pictures and settings.

    Raises:
        UsageError: If the file is there, of something else, or parts of another run are, or another
            run is at work.
    """

    def __init__(
        self,
        out: str | Path,
        pictures: Sequence[Picture],
        settings: Mapping[str, Any],
        part_size: int = 64,
    ) -> None:
        self.out, self.pictures, self.part_size = Path(out), list(pictures), part_size
        self.folder = Path(f'{out}.parts')
        content = json.dumps([settings, part_size, [list(one) for one in pictures]])
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        self.settings = dict(settings)
        self._stack = contextlib.ExitStack()
        self.complete = False

    def __enter__(self) -> 'ResultTable':
        require_arrow()
        if self.out.exists():
            if not self.out.is_file() or _about(self.out).get('digest') != self.digest:
                raise UsageError(
                    f"'{self.out}' is there already, of other pictures or settings: name another, "
                    'or remove it'
                )
            # Parts are left where a run was killed behind its last step.
            shutil.rmtree(self.folder, ignore_errors=True)
            self.complete = True
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._stack.enter_context(open(self.folder / 'lock', 'a'))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another run is writing '{self.out}': wait for it") from None
        plan = self.folder / 'plan.json'
        if plan.is_file() and json.loads(plan.read_text())['digest'] != self.digest:
            self._stack.close()
            raise UsageError(
                f"'{self.folder}' has parts of a run with other pictures, detector or settings: "
                'repeat that command to go on, or remove the folder'
            )
        if not plan.is_file():
            write_atomically(json.dumps(dict(digest=self.digest, **self.settings)).encode(), plan)
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there."""
        count = -(-len(self.pictures) // self.part_size)
        return [number for number in range(count) if not self._path(number).is_file()]

    def part(self, number: int) -> list[Picture]:
        """The pictures of a part."""
        return self.pictures[number * self.part_size :][: self.part_size]

    def write(self, number: int, rows: Sequence[Row]) -> None:
        """Put a part there."""
        import pyarrow as pa
        from pyarrow import parquet

        expected = [picture.name for picture in self.part(number)]
        if [row['picture'] for row in rows] != expected:
            raise ValueError(f'part {number} is of other pictures')
        content = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(list(rows), _schema()), content)
        write_atomically(content.getvalue(), self._path(number))

    def finish(self) -> dict[str, int]:
        """Join all parts; how many pictures there are, and how many of them could not be read."""
        from pyarrow import parquet

        counts = dict(pictures=0, errors=0)
        about = json.dumps(dict(digest=self.digest, **self.settings))
        schema = _schema().with_metadata({_ABOUT: about})

        def join(file: BinaryIO) -> None:
            with parquet.ParquetWriter(file, schema) as writer:
                for number in range(-(-len(self.pictures) // self.part_size)):
                    part = parquet.read_table(self._path(number), schema=_schema())
                    writer.write_table(part.cast(schema))
                    counts['pictures'] += len(part)
                    counts['errors'] += len(part) - part['error'].null_count

        write_atomically(join, self.out)
        shutil.rmtree(self.folder)
        return counts

    def _path(self, number: int) -> Path:
        return self.folder / f'part-{number:06}.parquet'


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a table, in order, some at a time in memory."""
    require_arrow()
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _about(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        metadata = parquet.read_schema(path).metadata or {}
        return json.loads(metadata.get(_ABOUT, b'{}'))
    except (pa.ArrowInvalid, OSError, ValueError):
        return {}


def write_coco(path: str | Path, table: str | Path, classes: Sequence[str]) -> None:
    """Write a table as a COCO file: images, and detections with scores as annotations. Pictures
    that could not be read are left out.

    Args:
        path (str or Path): The JSON file to make.
        table (str or Path): Its rows; see `ResultTable`.
        classes (Sequence[str]): Names; categories are numbered from 1 on.
    """

    def listed(file: BinaryIO, name: str, items: Iterator[dict]) -> None:
        file.write(f'"{name}": ['.encode())
        for number, item in enumerate(items):
            file.write((',\n' if number else '\n').encode() + json.dumps(item).encode())
        file.write(b']')

    def images() -> Iterator[dict]:
        for number, row in enumerate(read_rows(table), start=1):
            if row['error'] is None:
                yield dict(
                    id=number,
                    file_name=row['picture'],
                    width=row['width'],
                    height=row['height'],
                    difficulty=row['difficulty'],
                    exit=row['exit'],
                )

    def annotations() -> Iterator[dict]:
        count = 0
        for number, row in enumerate(read_rows(table), start=1):
            for (left, top, right, bottom), label, score in zip(
                row['boxes'], row['labels'], row['scores']
            ):
                count += 1
                width, height = right - left, bottom - top
                yield dict(
                    id=count,
                    image_id=number,
                    category_id=label + 1,
                    bbox=[left, top, width, height],
                    area=width * height,
                    iscrowd=0,
                    score=score,
                )

    def write(file: BinaryIO) -> None:
        file.write(b'{')
        listed(file, 'images', images())
        file.write(b',\n')
        listed(file, 'annotations', annotations())
        file.write(b',\n')
        categories = (dict(id=number, name=name) for number, name in enumerate(classes, start=1))
        listed(file, 'categories', categories)
        file.write(b'}\n')

    write_atomically(write, path)

"""Which pictures are meant: folders, patterns, lists, tar shards, buckets."""

import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..datasets.picture_formats import has_picture_suffix, picture_suffixes
from ..errors import UsageError, import_optional, reason_of

#: How tar shards end that must be read from their beginning to find a member.
_PACKED = ('.tgz', '.tar.gz', '.tar.bz2', '.tar.xz', '.tar.zst')


class Picture(NamedTuple):
    """Where a picture is.

    Attributes:
        name (str): What results call it: its path or URL; of a member of a tar shard, the shard's
            and its own, ``shard.tar/member.jpg``.
        file (str): Path or URL of the file.
        start, size (int): Where its bytes are in it; a size of -1 is all.
    """

    name: str
    file: str
    start: int = 0
    size: int = -1


def list_pictures(sources: Sequence[str]) -> list[Picture]:
    """All pictures of some sources, in the order of these; those of a folder or pattern by name.

    Args:
        sources (Sequence[str]): Each a picture, a folder (all below it), a pattern with ``*``, a
            list of such in a ``.txt`` file, one a line, or a ``.tar`` file; paths, or URLs of any
            kind that fsspec opens (``s3://bucket/folder``).

    Raises:
        UsageError: If a source is none of these or has no picture, or two have one name.
    """
    pictures = [picture for source in sources for picture in _pictures_of(str(source))]
    names = set()
    for picture in pictures:
        if picture.name in names:
            raise UsageError(f"'{picture.name}' is meant twice: name each picture once")
        names.add(picture.name)
    return pictures


def read_bytes(picture: Picture) -> bytes:
    """The bytes of a picture's file.

    Raises:
        OSError: If they cannot be read; other libraries' errors of buckets.
    """
    if '://' not in picture.file:
        with open(picture.file, 'rb') as file:
            file.seek(picture.start)
            return file.read(picture.size)
    files, path = file_system(picture.file)
    end = None if picture.size < 0 else picture.start + picture.size
    return files.cat_file(path, start=picture.start or None, end=end)


def file_system(url: str):
    """fsspec's file system of a URL, and the path in it.

    Raises:
        UsageError: If fsspec, or what it needs for this kind of URL, is not installed.
    """
    fsspec = import_optional('fsspec', 'buckets', 'bulk')
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"'{url}' cannot be opened: {reason_of(error)}") from None


def _pictures_of(source: str) -> Iterator[Picture]:
    try:
        if '*' in source:
            names = _matches(source)
            for name in names:
                if name.endswith('.tar'):
                    yield from _members(name)
            if not any(name.endswith('.tar') for name in names):
                yield from _plain(names, source)
        elif _is_folder(source):
            yield from _plain(_below(source), source)
        elif source.endswith(_PACKED):
            raise UsageError(
                f"'{source}' is compressed, so that no picture in it is found without reading all: "
                'unpack it, or pack it as plain .tar'
            )
        elif source.endswith('.tar'):
            yield from _members(source)
        elif source.endswith('.txt'):
            yield from _listed(source)
        elif has_picture_suffix(source):
            # One that is named and not there is a mistake.
            read_bytes(Picture(source, source, 0, 1))
            yield Picture(source, source)
        else:
            raise UsageError(
                f"'{source}' is no folder, picture, .tar or .txt by its name: pictures end in "
                f'{", ".join(picture_suffixes())}'
            )
    except OSError as error:
        why = error.strerror or reason_of(error)
        raise UsageError(f"'{source}' cannot be read: {why}") from None


def _is_folder(source: str) -> bool:
    if '://' not in source:
        return os.path.isdir(source)
    files, path = file_system(source)
    return files.isdir(path)


def _below(source: str) -> list[str]:
    """All files of a folder and of those in it."""
    if '://' not in source:
        return [
            os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names
        ]
    files, path = file_system(source)
    return [files.unstrip_protocol(name) for name in files.find(path)]


def _matches(pattern: str) -> list[str]:
    if '://' not in pattern:
        return sorted(glob.glob(pattern, recursive=True))
    files, path = file_system(pattern)
    return sorted(files.unstrip_protocol(name) for name in files.glob(path))


def _plain(names: Sequence[str], source: str) -> Iterator[Picture]:
    """The pictures among some files, by name; hidden ones are none."""
    kept = sorted(
        name
        for name in names
        if has_picture_suffix(name) and not os.path.basename(name).startswith('.')
    )
    if not kept:
        raise UsageError(
            f"there is no picture in '{source}': looked for {', '.join(picture_suffixes())}"
        )
    for name in kept:
        yield Picture(name, name)


def _listed(source: str) -> Iterator[Picture]:
    """Of a list: paths are from its folder on. They are taken as they are; what is not there will
    have its error."""
    try:
        content = read_bytes(Picture(source, source)).decode()
        lines = [line.strip() for line in content.splitlines()]
    except UnicodeDecodeError:
        raise UsageError(f"'{source}' is no list: it is not UTF-8 text") from None
    folder = source.rpartition('/')[0]
    lines = [line for line in lines if line and not line.startswith('#')]
    if not lines:
        raise UsageError(f"the list '{source}' is empty")
    for line in lines:
        if '://' not in line and not os.path.isabs(line) and folder:
            line = f'{folder}/{line}'
        if line.endswith('.tar'):
            yield from _members(line)
        else:
            yield Picture(line, line)


def _members(source: str) -> Iterator[Picture]:
    """The pictures of a tar shard, by where they are: only its heads are read."""
    count = 0
    try:
        with _opened(source) as file, tarfile.open(fileobj=file, mode='r:') as shard:
            for member in shard:
                name = Path(member.name).name
                if member.isfile() and has_picture_suffix(name) and not name.startswith('.'):
                    count += 1
                    yield Picture(
                        f'{source}/{member.name}', source, member.offset_data, member.size
                    )
    except tarfile.TarError as error:
        raise UsageError(f"'{source}' is no tar file, or damaged: {reason_of(error)}") from None
    if not count:
        raise UsageError(f"there is no picture in '{source}'")


def _opened(source: str) -> BinaryIO:
    if '://' not in source:
        return open(source, 'rb')
    files, path = file_system(source)
    return files.open(path, 'rb')

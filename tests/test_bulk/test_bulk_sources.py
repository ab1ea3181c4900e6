import io
import os
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from conftest import SEED
from dynamicdet.bulk.sources import Picture, list_pictures, read_bytes
from dynamicdet.errors import UsageError


def picture(number=0):
    content = io.BytesIO()
    generator = np.random.default_rng(SEED + number)
    Image.fromarray(generator.integers(0, 256, (8, 9, 3), np.uint8)).save(content, 'PNG')
    return content.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one below it, a list and a shard; it is where we are."""
    monkeypatch.chdir(tmp_path)
    names = ['a/2.png', 'a/1.PNG', 'a/b/3.jpg', 'a/.hidden.png', 'a/notes.md', 'c/4.png']
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    with tarfile.open(tmp_path / 'shard.tar', 'w') as shard:
        shard.add('a/2.png')
        shard.add('a/notes.md')
        shard.add('c/4.png', 'deep/er/x.png')
    (tmp_path / 'c' / 'list.txt').write_text('# some\n4.png\n\n../a/2.png\ngone.png\n')
    return tmp_path


def names(*sources):
    return [one.name for one in list_pictures(sources)]


def test_all_kinds_of_sources(folder):
    assert names('a') == ['a/1.PNG', 'a/2.png', 'a/b/3.jpg']
    assert names('c/4.png', 'a/*.png') == ['c/4.png', 'a/2.png']
    assert names('a/**/*.jpg') == ['a/b/3.jpg']
    assert names('c/list.txt') == ['c/4.png', 'c/../a/2.png', 'c/gone.png']
    assert names('shard.tar') == ['shard.tar/a/2.png', 'shard.tar/deep/er/x.png']
    assert names('*.tar') == names('shard.tar')
    assert names(str(folder / 'a' / 'b')) == [str(folder / 'a' / 'b' / '3.jpg')]


def test_bytes_are_those_of_the_files(folder):
    members = list_pictures(['shard.tar'])
    assert [read_bytes(one) for one in members] == [picture(0), picture(5)]
    assert read_bytes(*list_pictures(['a/2.png'])) == picture(0)


def test_a_bucket(folder):
    files = fsspec.filesystem('memory')
    for name in ('a/2.png', 'c/4.png', 'shard.tar'):
        files.pipe_file(f'/bucket/{name}', (folder / name).read_bytes())
    try:
        assert names('memory://bucket/a') == ['memory:///bucket/a/2.png']
        assert names('memory://bucket/*/*.png') == [
            'memory:///bucket/a/2.png',
            'memory:///bucket/c/4.png',
        ]
        found = list_pictures(['memory://bucket/c/4.png', 'memory://bucket/shard.tar'])
        assert [read_bytes(one) for one in found] == [picture(5), picture(0), picture(5)]
        with pytest.raises(UsageError, match='gone'):
            list_pictures(['memory://bucket/gone.png'])
    finally:
        files.rm('/bucket', recursive=True)


def test_what_is_no_source_gets_one_line(folder):
    os.mkdir('empty')
    (folder / 'packed.tar.gz').write_bytes(b'')
    (folder / 'broken.tar').write_bytes(b'x' * 2000)
    (folder / 'empty.txt').write_text('\n')
    (folder / 'odd.txt').write_bytes(b'\xff\xfe')
    for source, words in {
        'gone.png': 'No such file',
        'gone': 'no folder, picture',
        'empty': 'no picture in',
        'a/*.gif': 'no picture in',
        'a/notes.md': 'by its name',
        'packed.tar.gz': 'compressed',
        'broken.tar': 'no tar file',
        'empty.txt': 'is empty',
        'odd.txt': 'not UTF-8',
        'nosuch://bucket/a': 'nosuch',
    }.items():
        with pytest.raises(UsageError, match=words) as raised:
            list_pictures([source])
        assert '\n' not in str(raised.value)
    with pytest.raises(UsageError, match='twice'):
        list_pictures(['a', 'a/2.png'])
    assert Picture('a', 'b').size == -1

"""Compressed checkpoints: exact where promised, small, and refused when damaged."""

import builtins
import json
import math
import struct

import numpy as np
import pytest
import torch

from dynamicdet.compression import ddz
from dynamicdet.compression.ddz import compress, read_compressed, write_compressed
from dynamicdet.compression.encoding import Lossy
from dynamicdet.errors import UsageError


def write(state, path, lossy=Lossy(), **more):
    compressed = compress(dict(state_dict=state, **more), lossy)
    write_compressed(compressed, str(path))
    return compressed


def encodings(compressed):
    return {entry.row['key']: entry.row['encoding'] for entry in compressed.entries}


def same_bits(first, second):
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
    )


def sparse(share, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < share, 0, value)


def odd_state():
    """All types, shapes and values that a float format could spoil."""
    strange = torch.tensor([0.0, -0.0, float('nan'), float('inf'), -float('inf'), 1e-42, 3.0])
    state = {
        str(dtype): torch.arange(12).reshape(3, 4).to(dtype)
        for dtype in (
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
    return dict(
        state,
        strange=strange,
        sparse=sparse(0.8, 40, 50),
        scalar=torch.tensor(3),
        nan=torch.tensor(math.nan),
        empty=torch.zeros(0, 3),
        zeros=torch.zeros(40, 40),
        ones=torch.ones(3),
        dense=torch.randn(30, 40),
        few=torch.tensor([-0.0, 0.5, 0.0])[torch.randint(3, (60, 60))],
        many=strange.repeat(40)[:, None],
        view=torch.randn(6, 8).t()[::2],
    )


def test_every_bit_comes_back(tmp_path):
    state = odd_state()
    compressed = write(state, tmp_path / 'a.ddz')
    back = read_compressed(str(tmp_path / 'a.ddz'))['state_dict']
    assert list(back) == list(state)
    assert all(same_bits(back[key], value) for key, value in state.items())
    kinds = encodings(compressed)
    assert (kinds['sparse'], kinds['dense'], kinds['few']) == ('sparse', 'raw', 'codebook')


def test_what_is_held_twice_is_stored_once(tmp_path):
    weight = torch.randn(50, 50)
    compressed = write(dict(a=weight, b=weight, c=weight.clone(), d=weight + 1), tmp_path / 'a.ddz')
    assert encodings(compressed) == dict(a='raw', b='same', c='same', d='raw')
    back = read_compressed(str(tmp_path / 'a.ddz'))['state_dict']
    back['b'].zero_()
    assert same_bits(back['a'], weight) and same_bits(back['c'], weight)


def test_meta_comes_back(tmp_path):
    meta = dict(
        epoch=3,
        classes=('a', 'b'),
        nested=dict(palette=[(1, 2), (3, 4)], none=None, rate=0.5),
        count=np.int64(4),
        odd=object(),
        text='model = dict()\n"quoted" \u00e9',
    )
    compressed = write(
        dict(w=torch.ones(2)), tmp_path / 'a.ddz', meta=meta, optimizer={}, message_hub={}
    )
    assert compressed.dropped == ['optimizer', 'message_hub', 'meta.odd']
    meta.pop('odd')
    assert read_compressed(str(tmp_path / 'a.ddz'))['meta'] == meta


def test_ranges_of_a_quantization_aware_training_come_back(tmp_path):
    ranges = {'first/conv': torch.tensor([-0.1, 1 / 3]), 'branch0/a b': torch.tensor([0.0, 7e-30])}
    write(
        dict(w=torch.ones(2)),
        tmp_path / 'a.ddz',
        meta=dict(epoch=1),
        quantization=dict(ranges=ranges, reduced=True, float_share=0.1),
    )
    found = read_compressed(str(tmp_path / 'a.ddz'))
    assert found['meta'] == dict(epoch=1)
    own = found['quantization']
    assert (own['reduced'], own['float_share']) == (True, 0.1) and own[
        'ranges'
    ].keys() == ranges.keys()
    assert all(torch.equal(own['ranges'][key], value) for key, value in ranges.items())


# Wherever a checkpoint loads.


# Refusals.


@pytest.fixture
def small(tmp_path):
    path = tmp_path / 'small.ddz'
    write(
        dict(a=sparse(0.6, 9, 9), b=torch.ones(3), c=torch.tensor(2)),
        path,
        Lossy(int8=['a']),
        meta=dict(epoch=1),
    )
    return path


def refused(path):
    with pytest.raises(UsageError) as caught:
        read_compressed(str(path))
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_a_truncated_file_is_refused_wherever_it_ends(small):
    content = small.read_bytes()
    for size in [*range(0, len(content), 41), len(content) - 1]:
        small.write_bytes(content[:size])
        refused(small)
    small.write_bytes(content + b'x')
    refused(small)


def test_an_altered_byte_is_refused_wherever_it_is(small):
    content = small.read_bytes()
    for place in range(0, len(content), 5):
        small.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        refused(small)
    small.write_bytes(content)
    assert len(read_compressed(str(small))['state_dict']) == 3


def test_each_tensor_has_a_checksum_of_its_own(small, monkeypatch):
    """With the file's own made to agree, an index that names other values is still refused."""
    from safetensors.numpy import load, save

    content = small.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack('<Q', content[:8])[0]])['__metadata__']
    index = json.loads(header['index'])
    index['entries'][1]['sha256'] = index['entries'][0]['sha256']
    header['index'] = json.dumps(index)
    arrays = load(content)
    header['sha256'] = ddz._digest_of_file(
        header, {name: one.tobytes() for name, one in arrays.items()}
    )
    small.write_bytes(save(arrays, metadata=header))
    assert "the checksum of 'b' is another" in refused(small)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save

    path = tmp_path / 'a.ddz'
    torch.save(dict(state_dict=dict(w=torch.ones(2))), path)
    refused(path)
    path.write_bytes(save(dict(w=torch.ones(2)), metadata=dict(format='pt')))
    assert 'no compressed checkpoint' in refused(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_compressed(str(path))


def test_a_name_without_the_suffix(tmp_path):
    with pytest.raises(UsageError, match='must end in .ddz'):
        write(dict(w=torch.ones(2)), tmp_path / 'a.pth')


@pytest.mark.parametrize('name', ['zstandard', 'safetensors'])
def test_a_missing_library_is_named(name, small, monkeypatch):
    real = builtins.__import__

    def absent(wanted, *arguments, **keywords):
        if wanted.split('.')[0] == name:
            raise ImportError(wanted)
        return real(wanted, *arguments, **keywords)

    monkeypatch.setattr(builtins, '__import__', absent)
    with pytest.raises(
        UsageError, match=f"need '{name}'.*pip install -r requirements/compression.txt"
    ):
        read_compressed(str(small))
    with pytest.raises(UsageError, match=f"need '{name}'"):
        compress(dict(state_dict=dict(w=torch.ones(2))))


def test_an_interrupted_writer_leaves_the_old_file(small, monkeypatch):
    import os

    before = small.read_bytes()

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'):
        write(dict(w=torch.randn(9, 9)), small)
    assert small.read_bytes() == before and len(list(small.parent.iterdir())) == 1

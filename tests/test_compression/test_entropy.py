"""Huffman's code, by hand and in its limits; gaps; sizes of a file's streams."""

import numpy as np
import pytest
import torch
from test_ddz import sparse

from dynamicdet.compression.encoding import Lossy, encode_state
from dynamicdet.compression.entropy import (
    code_lengths,
    compare_stream_sizes,
    entropy_bytes,
    huffman_size,
    index_gaps,
    stream_table,
)


@pytest.mark.parametrize(
    'counts, lengths',
    [
        # The example of Huffman's paper is of such a kind: each merge by hand.
        ([8, 4, 2, 1, 1], [1, 2, 3, 4, 4]),
        ([45, 13, 12, 16, 9, 5], [1, 3, 3, 3, 4, 4]),
        ([1, 1, 1, 1], [2, 2, 2, 2]),
        ([0, 7, 0], [0, 1, 0]),
        ([3, 0, 5], [1, 0, 1]),
        ([], []),
        ([0], [0]),
    ],
)
def test_lengths_of_known_distributions(counts, lengths):
    assert code_lengths(counts).tolist() == lengths


@pytest.mark.parametrize('seed', range(5))
def test_a_code_can_be_read_and_is_near_the_entropy(seed):
    """Kraft's sum is 1 and the mean length within one bit of the entropy (Shannon)."""
    counts = (np.random.default_rng(seed).pareto(1, 200) * 10).astype(int)
    lengths = code_lengths(counts)
    assert ((lengths > 0) == (counts > 0)).all()
    assert (2.0 ** -lengths[lengths > 0]).sum() == pytest.approx(1)
    symbols = np.repeat(np.arange(200), counts).astype(np.uint8)
    mean, least = counts @ lengths / counts.sum(), 8 * entropy_bytes(symbols) / counts.sum()
    assert least <= mean < least + 1


def test_sizes_count_bits_and_the_table():
    symbols = np.repeat(np.arange(5), [8, 4, 2, 1, 1]).astype(np.uint8)
    # 8 + 8 + 6 + 4 + 4 bits, and 5 lengths of 6 bits.
    assert huffman_size(symbols) == 4 + 4
    assert entropy_bytes(symbols) == pytest.approx(30 / 8)
    assert huffman_size(symbols[:0]) == entropy_bytes(symbols[:0]) == 0


def test_gaps_by_hand():
    kept = np.zeros(1000, bool)
    kept[[0, 1, 5, 260, 516, 900]] = True
    # 254 between 5 and 260; 255 between 260 and 516: a filler and none.
    assert index_gaps(kept).tolist() == [0, 0, 3, 254, 255, 0, 255, 128]
    assert index_gaps(kept[:0]).tolist() == index_gaps(np.zeros(9, bool)).tolist() == []


@pytest.mark.parametrize('share', [0.5, 0.9, 0.999])
def test_gaps_say_where_weights_are(share):
    kept = np.random.default_rng(0).random(20_000) > share
    places, at = [], -1
    for gap in index_gaps(kept).tolist():
        at += gap + (gap < 255)
        places += [at] if gap < 255 else []
    assert places == np.flatnonzero(kept).tolist()


def test_streams_of_a_file_are_compared():
    state = dict(
        a=sparse(0.9, 100, 100),
        b=sparse(0.9, 100, 100, seed=1),
        c=torch.randn(60, 60),
        bias=torch.ones(7),
    )
    entries = encode_state(state, Lossy(codebook=4, codebook_keys=['a', 'b'], int8=['c']))
    sizes = {size.name: size for size in compare_stream_sizes(entries)}
    assert set(sizes) == {
        'codebook table',
        'codebook values',
        'codebook bits',
        'codebook gaps',
        'int8 scale',
        'int8 values',
        'raw values',
    }
    kept = int(state['a'].count_nonzero() + state['b'].count_nonzero())
    assert sizes['codebook values'].plain == kept and sizes['codebook bits'].plain == 2 * 1250
    # All of the file's frames, and no more.
    assert sum(size.zstd for name, size in sizes.items() if 'gaps' not in name) == sum(
        entry.size for entry in entries
    )
    # 15 values: below 4 bits of 8; no code of symbols is below the entropy.
    assert sizes['codebook values'].huffman < kept / 2 + 40
    assert all(size.huffman >= size.entropy for size in sizes.values())
    lines = stream_table(list(sizes.values()))
    assert len(lines) == 8 and all('smaller by' in line for line in lines[1:])
    assert compare_stream_sizes([]) == []


@pytest.mark.parametrize('bits', [2, 4, 6])
def test_a_file_takes_what_huffman_would(bits):
    """Indices of normally distributed weights: within 1 %, so the format has no code of its own."""
    entries = encode_state(
        dict(w=torch.randn(300, 300, generator=torch.Generator().manual_seed(0))),
        Lossy(codebook=bits),
    )
    values = next(size for size in compare_stream_sizes(entries) if size.name == 'codebook values')
    assert values.zstd == pytest.approx(values.huffman, rel=0.01)

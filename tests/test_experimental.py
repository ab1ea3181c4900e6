"""What is experimental says so once, and nothing else does."""

import warnings

import pytest

from conftest import ROOT
from dynamicdet.compression.encoding import Lossy, encode_state
from dynamicdet.compression.entropy import stream_table
from dynamicdet.experimental import EXPERIMENTAL
from dynamicdet.routing import OBJECTIVES, build_objective
from dynamicdet.video import Gate
from dynamicdet.video.part_building import build_gate, build_propagation
from mmdet.registry import MODELS


def said(function, *arguments):
    """What warns of an experimental thing."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        function(*arguments)
    return [str(one.message) for one in seen if 'experimental' in str(one.message)]


@pytest.mark.parametrize('name', OBJECTIVES)
def test_objectives(name):
    wanted = name in EXPERIMENTAL['objective']
    assert wanted == (name not in ('paper', 'rank', 'ap'))
    assert len(said(build_objective, dict(type=name, offset=0.1))) == wanted


GATES = [
    name
    for name, kind in MODELS.module_dict.items()
    if isinstance(kind, type) and issubclass(kind, Gate)
]


@pytest.mark.parametrize('name', GATES)
def test_gates(name):
    """Also inside another."""
    settings = dict(exit=1) if name == 'FixedExit' else {}
    wanted = name in EXPERIMENTAL['gate']
    assert wanted == (name != 'TemporalGate')
    for gate in [dict(type=name, **settings)] + [
        dict(type='TemporalGate', gate=dict(type=name, **settings))
    ] * wanted:
        assert len(said(build_gate, gate, [4, 4], 4)) == wanted


def test_propagation():
    assert not said(build_propagation, None, [])
    assert len(said(build_propagation, dict(size=8), [])) == 1


def test_encodings():
    for lossy in (Lossy(), Lossy(int8=[], codebook=4, codebook_keys=[])):
        assert not said(encode_state, {}, lossy)
    assert len(said(encode_state, {}, Lossy(binary=[]))) == 1
    assert len(said(stream_table, [])) == 1


def test_the_docs_name_all():
    page = (ROOT / 'docs/experimental.md').read_text()
    assert len(page.split()) <= 200
    for names in EXPERIMENTAL.values():
        assert all(name.lower() in page.lower() for name in names)

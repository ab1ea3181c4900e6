"""The metafiles name every shipped detector once, in the form that OpenMMLab's tools read."""

from collections import Counter

import pytest
import yaml
from mmengine.infer import BaseInferencer

from conftest import ROOT
from dynamicdet.errors import UsageError
from dynamicdet.measuring.model_zoo import COUNTED, read_models

INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())
FILES = {name: yaml.safe_load((ROOT / name).read_text()) for name in INDEX['Import']}
MODELS = [model for file in FILES.values() for model in file['Models']]
PAPERS = [model['Figures Of The Paper'] for model in MODELS if 'Figures Of The Paper' in model]


def test_every_metafile_is_imported():
    assert list(INDEX) == ['Import']
    assert sorted(FILES) == [
        f'configs/metafiles/{path.name}' for path in sorted((ROOT / 'configs/metafiles').iterdir())
    ]


def test_every_detector_is_named_once():
    shipped = [
        f'configs/{path.name}'
        for path in (ROOT / 'configs').glob('dy_*.py')
        if not path.stem.endswith(('_router', '_digits'))
    ]
    assert Counter(model['Config'] for model in MODELS) == Counter(shipped)
    assert max(Counter(model['Name'] for model in MODELS).values()) == 1
    assert list(read_models(ROOT)) == [model['Config'] for model in MODELS]


def test_mmengine_reads_them():
    found = BaseInferencer._get_models_from_metafile(str(ROOT))
    assert [model['Name'] for model in found] == [model['Name'] for model in MODELS]


@pytest.mark.parametrize('name', FILES)
def test_the_form(name):
    file = FILES[name]
    assert set(file) == {'Collections', 'Models'}
    collections = [collection['Name'] for collection in file['Collections']]
    for collection in file['Collections']:
        assert set(collection['Paper']) == {'URL', 'Title'}
        assert collection['Metadata']['FLOPs Counted As'] in COUNTED
    for model in file['Models']:
        assert model['Config'] == f'configs/{model["Name"]}.py'
        assert model['In Collection'] in collections
        # What would be taken for ours.
        assert not {'Results', 'Weights'} & set(model)


@pytest.mark.parametrize('figures', PAPERS, ids=lambda figures: figures['Source'])
def test_the_papers_figures(figures):
    assert figures['URL'].startswith('https://arxiv.org/abs/')
    rows = figures['At Percent Hard']
    assert list(rows) == sorted(rows) and {0, 100} <= set(rows) <= set(range(101))
    for name in ('GFLOPs', 'box AP val'):
        values = [row[name] for row in rows.values() if name in row]
        assert values and values == sorted(values), name
    # A share of hard images costs that share of the way between the ends.
    easy, hard = rows[0]['GFLOPs'], rows[100]['GFLOPs']
    for percent, row in rows.items():
        assert row['GFLOPs'] == pytest.approx(easy + percent / 100 * (hard - easy), abs=0.06)


def test_a_detector_in_no_metafile(tmp_path):
    (tmp_path / 'configs').mkdir()
    for name in ('dy_new.py', 'dy_new_router.py', 'dy_new_digits.py', 'other.py'):
        (tmp_path / 'configs' / name).touch()
    (tmp_path / 'model-index.yml').write_text('Import: []')
    with pytest.raises(UsageError, match='^configs/dy_new.py: '):
        read_models(tmp_path)

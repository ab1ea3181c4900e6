"""The page docs/model_zoo.md: what the shipped detectors cost, and what papers say of them.

The detectors and the papers' figures are in the metafiles that model-index.yml imports, in the form
that OpenMMLab's tools read. Beside its fields, a collection's ``Metadata`` has ``FLOPs Counted
As``, and a model may have ``Figures Of The Paper``, which are not under ``Results``, where a
model's own would be.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from mmengine.config import Config

from ..errors import UsageError
from ..models import fuse
from .flops import Costs, build_detector, count_parameters, measure_costs, stated_shape

#: Shares of hard images that have a column.
SHARES = (0, 0.1, 0.5, 0.9, 1)
#: What ``FLOPs Counted As`` may be, and how many operations it is.
COUNTED = {'multiply-adds': 2, '2 x multiply-adds': 1}
#: Configs without a row: second steps, and detectors for the built-in data.
_NO_ROW = ('_router', '_digits')
_COLUMNS = (
    'config',
    'parameters, M',
    *(f'{share:.0%} hard' for share in SHARES),
    'GFLOPs counted as',
    "the papers' AP, not ours",
)
_HEAD = """# Model zoo

Written by `python tools/get_flops.py --zoo`. What it counts, and how, is in
[evaluating.md](evaluating.md#size-and-flops).

**The AP in the last column is the papers' own, not ours**: of their weights and code, on COCO val,
at the share of hard images that stands beside it. This project has trained no detector on COCO and
offers no weights.

GFLOPs are per image, at 0, 10, 50, 90 and 100% hard images, counted as the detector's own paper
counts them: multiply-adds, or twice that. Only rows of one kind compare. YOLOv7 is counted fused,
as its paper does; the others have nothing to fuse that counts. Parameters are those of the whole
detector in training, router included.
"""


def read_models(root: Path) -> dict[str, dict]:
    """The detectors of the repository at ``root`` that have a row, in the metafiles' order.

    Returns:
        dict: Config, such as 'configs/dy_fcos.py' -> its metafile's entry.

    Raises:
        UsageError: If a config is in no metafile.
    """
    shipped = {
        f'configs/{path.name}'
        for path in (root / 'configs').glob('dy_*.py')
        if not path.stem.endswith(_NO_ROW)
    }
    index = yaml.safe_load((root / 'model-index.yml').read_text())
    entries = {}
    for name in index['Import']:
        metafile = yaml.safe_load((root / name).read_text())
        collections = {collection['Name']: collection for collection in metafile['Collections']}
        for model in metafile['Models']:
            metadata = collections[model['In Collection']]['Metadata']
            entries[model['Config']] = {**metadata, **model}
    absent = sorted(shipped - set(entries))
    if absent:
        raise UsageError(
            f'{", ".join(absent)}: to have a row, be named in a file of configs/metafiles'
        )
    return {config: entry for config, entry in entries.items() if config in shipped}


def count_row(root: Path, entry: Mapping) -> list[str]:
    """Count a detector of the repository at ``root``, fused where it can be: the cells of its
    row."""
    cfg = Config.fromfile(root / entry['Config'])
    model, shape = build_detector(cfg), stated_shape(cfg)
    parameters = count_parameters(model)
    return make_row(entry, parameters, measure_costs(fuse(model), shape), shape)


def make_row(entry: Mapping, parameters: int, costs: Costs, shape: Sequence[int]) -> list[str]:
    """The cells of a detector's row.

    Args:
        entry (Mapping): From `read_models`.
        parameters (int): All of the detector's.
        costs (Costs): Per image.
        shape (Sequence[int]): Height and width of the image.
    """
    counted = entry['FLOPs Counted As']
    gflops = [f'{costs.at(share) / COUNTED[counted] / 1e9:.1f}' for share in SHARES]
    return [
        f'[{entry["Name"]}](../{entry["Config"]})',
        f'{parameters / 1e6:.2f}',
        *gflops,
        f'{counted}, {shape[0]} x {shape[1]}',
        papers_ap(entry),
    ]


def papers_ap(entry: Mapping) -> str:
    """The papers' AP at each share that they state, and whose it is; empty where there is none."""
    figures = entry.get('Figures Of The Paper', {})
    stated = []
    for percent, figures_at_share in figures.get('At Percent Hard', {}).items():
        box, mask = (figures_at_share.get(f'{kind} AP val') for kind in ('box', 'mask'))
        if box is not None:
            stated.append(
                f'{box} at {percent}%' if mask is None else f'{box} box, {mask} mask at {percent}%'
            )
    return f'{"; ".join(stated)} ([{figures["Source"]}]({figures["URL"]}))' if stated else ''


def make_model_zoo_page(rows: Sequence[Sequence[str]]) -> str:
    """The page in Markdown."""
    lines = [' | '.join(cells) for cells in (_COLUMNS, ['---'] * len(_COLUMNS), *rows)]
    return '\n'.join([_HEAD, *(f'| {line} |' for line in lines)]) + '\n'

"""What the experiment on compression measures: a table of steps."""

from collections.abc import Sequence
from typing import NamedTuple

from routing_runs import SEEDS

#: The detector: a run of the experiment on routing, Faster R-CNN R-18 at 128 pixels, trained for
#: two epochs on 20,000 images of all sizes and for one on 8,000 of its own.
START = 'faster_rcnn-plain_128-0'
SEED = SEEDS[0]
#: Of the seed's Table 2; the backbone is with the neck. "Both" are two tasks with the same target.
BLOCKS = dict(
    backbone=(('backbone', 'neck'),),
    roi_head=(('roi_head',),),
    both=(('backbone', 'neck'), ('roi_head',)),
)
SHARES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
#: A channel less of a prediction layer would be a class or a side less.
PREDICTIONS = ('*.fc_cls', '*.fc_reg')
METHODS = dict(
    l1_global=dict(over='block'),
    l1_local=dict(over='layer'),
    random=dict(score='random'),
    structured=dict(structured=True, over='layer', exclude=PREDICTIONS),
)
#: Shares after which pruned detectors are tuned: where the curve bends; the other methods in both
#: blocks alone.
TUNED_SHARES = (30, 50, 70, 90, 80)
OTHERS_TUNED = (50, 70)
BITS = (2, 3, 4, 5, 6, 7, 8)
#: Layers that are binary alone; the first convolution is not among those of the backbone, as in
#: XNOR-Net.
BINARY = dict(fc=['roi_head.bbox_head.shared_fcs.*'], backbone=['backbone.layer*'], all=['*'])

#: Fine-tuning: one epoch on so many training images. The first 150 of its 375 iterations prune.
TUNING = {
    'train_dataloader.dataset.indices': 3000,
    'train_cfg.max_epochs': 1,
    'param_scheduler.1.T_max': 1,
    'randomness.seed': SEED,
    # The test set is measured afterwards.
    'val_dataloader': None,
    'val_evaluator': None,
    'val_cfg': None,
}
PRUNING = dict(
    type='PruningHook', schedule='cubic', start=0, end=150, interval=15, by_epoch=False, seed=SEED
)
#: What fine-tuned files hold: every bit, or integers of 8 bits.
FILES: dict[str, dict] = dict(exact={}, int8=dict(int8=[]))


class Step(NamedTuple):
    """One step: a detector, fine-tuned or not, and what is measured of it.

    Attributes:
        name (str): Of its file of results.
        points (dict): Name -> what is done before it is measured: ``blocks``, arguments of `PruningBlock`
            to prune to, or ``lossy``, arguments of `Lossy` by which it is written and read back.
        hooks (tuple, optional): Of the fine-tuning; None without it.
        start (str): The run or step whose weights it takes.
        lr (float): Of the fine-tuning.
    """

    name: str
    points: dict[str, dict]
    hooks: tuple[dict, ...] | None = None
    start: str = START
    lr: float = 3e-4


def all_steps() -> list[Step]:
    """All steps; what says most comes first."""
    base = [Step('base', dict(exact={})), _tuned('base', ())]
    sweeps = [
        Step(
            f'prune-{method}-{block}',
            {f'{share}': dict(blocks=pruned(block, share, method)) for share in SHARES},
        )
        for method in METHODS
        for block in BLOCKS
    ]
    tuned = [
        _tuned(
            f'prune-{block}-{share}',
            [dict(PRUNING, blocks=pruned(block, share))],
            files=FILES if block == 'both' else ('exact',),
        )
        for share in TUNED_SHARES
        for block in BLOCKS
    ]
    others = [
        _tuned(
            f'prune-{method}-both-{share}', [dict(PRUNING, blocks=pruned('both', share, method))]
        )
        for share in OTHERS_TUNED
        for method in METHODS
        if method != 'l1_global'
    ]
    whole = [_shared(f'share-{bits}', bits) for bits in (4, 3, 2)]
    both = [
        _shared(f'share-4-pruned-{share}', 4, f'tuned-prune-both-{share}') for share in (50, 70)
    ]
    return base + [sharing_sweep()] + sweeps + whole + tuned[:9] + both + others + tuned[9:]


def pruned(block: str, share: int, method: str = 'l1_global') -> list[dict]:
    """Arguments of `PruningBlock`, one for each part of a block."""
    return [
        dict(name=parts[0], modules=list(parts), target=share / 100, **METHODS[method])
        for parts in BLOCKS[block]
    ]


def sharing_sweep() -> Step:
    """Weights that take few values, without fine-tuning."""
    points = {f'share-{bits}': dict(lossy=dict(codebook=bits, codebook_keys=[])) for bits in BITS}
    points['int8'] = dict(lossy=dict(int8=[]))
    points.update(
        {f'binary-{name}': dict(lossy=dict(binary=keys)) for name, keys in BINARY.items()}
    )
    return Step('values', points)


def _tuned(
    name: str, hooks: Sequence[dict], start: str = START, files: Sequence[str] = ('exact',)
) -> Step:
    points = {file: dict(lossy=FILES[file]) for file in files}
    return Step(f'tuned-{name}', points, tuple(hooks), start)


def _shared(name: str, bits: int, start: str = START) -> Step:
    """A shared value moves thousands of weights at once, each of Adam's steps by as much as one
    weight's."""
    hook = dict(type='WeightSharingHook', blocks=[dict(name='all', modules=['*'], bits=bits)])
    return _tuned(name, [hook], start)._replace(lr=1e-4)

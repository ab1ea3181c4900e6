"""What the experiment on routing trains: a table of runs."""
from typing import Dict, List, NamedTuple

#: Images that step 1 sees, in order; the last `HELD_OUT` of the 9,000 are for routers alone.
DATA = dict(root='data/digits_routing', train=9000, val=1000, test=1000, size=128)
HELD_OUT = 1000
SEEDS = (0, 1, 2)


class Detector(NamedTuple):
    """A detector of the experiment: its configs, its epochs, what else its training needs."""
    plain: str
    dynamic: str
    epochs: int
    options: Dict[str, object]


DETECTORS = dict(
    yolox=Detector(
        'configs/yolox_nano_digits.py', 'configs/dy_yolox_nano_digits.py', epochs=3,
        options={'optim_wrapper.optimizer.lr': 3e-3}),
    faster_rcnn=Detector(
        'configs/faster_rcnn_digits.py', 'configs/dy_faster_rcnn_digits.py', epochs=2, options={}))

#: Dynamic variants: what differs from the dynamic config, whose exits are the first backbone at half the
#: size and both at the full one.
DYNAMIC = dict(
    resolution={'model.backbones': 1, 'model.shared': True},
    depth={'model.first_scale': 1.0},
    depth_resolution={},
    specialised={'model.first_scale': 1.0, 'model.specialise': 1.0},
    triple={'model.first_scale': 1.0, 'model.backbones': 3})

#: Plain detectors: side of the image, and what differs from the plain config.
PLAIN = dict(
    yolox={
        '64': (64, {}),
        '96': (96, {}),
        '128': (128, {}),
        '160': (160, {}),
        'deeper': (128, {'model.backbone.deepen_factor': 0.67, 'model.neck.num_csp_blocks': 2}),
    },
    faster_rcnn={
        '64': (64, {}),
        '96': (96, {}),
        '128': (128, {}),
        '160': (160, {}),
        'r34': (128, {'model.backbone.depth': 34}),
        'r50': (128, {'model.backbone.depth': 50, 'model.neck.in_channels': [128, 256, 512, 1024]}),
    })


class Run(NamedTuple):
    """One training of step 1, or of a plain detector."""
    detector: str
    variant: str
    seed: int
    config: str
    options: Dict[str, object]

    @property
    def name(self) -> str:
        return f'{self.detector}-{self.variant}-{self.seed}'

    @property
    def is_dynamic(self) -> bool:
        return self.variant in DYNAMIC


def all_runs(root: str = DATA['root']) -> List[Run]:
    """All runs; what says most comes first: seed by seed, dynamic and plain side by side."""
    runs = []
    for seed in SEEDS:
        for detector in DETECTORS:
            variants = [*DYNAMIC] if seed == 0 else [name for name in DYNAMIC if name != 'triple']
            plain = [f'plain_{name}' for name in PLAIN[detector]] if seed == 0 else []
            runs += [_run(detector, variant, seed, root) for variant in variants[:2] + plain + variants[2:]]
    return runs


def _run(name: str, variant: str, seed: int, root: str) -> Run:
    detector = DETECTORS[name]
    size, own = DATA['size'], DYNAMIC.get(variant)
    if own is None:
        size, own = PLAIN[name][variant.removeprefix('plain_')]
    options = {
        **data_options(root, size), **detector.options,
        'train_dataloader.dataset.indices': DATA['train'] - HELD_OUT,
        'train_cfg.max_epochs': detector.epochs,
        'train_cfg.val_interval': detector.epochs,
        'param_scheduler.1.T_max': detector.epochs,
        'randomness.seed': seed,
        **own
    }
    return Run(name, variant, seed, detector.dynamic if variant in DYNAMIC else detector.plain, options)


def data_options(root: str, size: int) -> Dict[str, object]:
    """Point a config of the built-in data at this experiment's, delivered at a size."""
    options: Dict[str, object] = {'train_dataloader.dataset.pipeline.2.scale': (size, size)}
    for split in ('val', 'test'):
        options[f'{split}_dataloader.dataset.pipeline.1.scale'] = (size, size)
        options[f'{split}_evaluator.ann_file'] = f'{root}/annotations/instances_{split}.json'
    for split in ('train', 'val', 'test'):
        options[f'{split}_dataloader.dataset.data_root'] = f'{root}/'
    return options

"""What the experiment on routing trains: a table of runs."""

from typing import NamedTuple

#: The first 20,000 training images are for detectors, the last 1,000 for routers alone.
DATA = dict(root='data/digits_routing', train=21000, val=1000, test=1000, size=128)
HELD_OUT = 1000
#: How many of them a run takes: the weights that all runs of a detector start from, as published
#: weights would be; and each run, one epoch.
PRETRAINING = DATA['train'] - HELD_OUT
FINE_TUNING = 8000
SEEDS = (0, 1, 2)


class Detector(NamedTuple):
    """A detector of the experiment: its configs, and the learning rates of both trainings."""

    plain: str
    dynamic: str
    pretraining_lr: float
    lr: float


DETECTORS = dict(
    yolox=Detector('configs/yolox_nano_digits.py', 'configs/dy_yolox_nano_digits.py', 5e-3, 2e-3),
    faster_rcnn=Detector(
        'configs/faster_rcnn_digits.py', 'configs/dy_faster_rcnn_digits.py', 1e-3, 5e-4
    ),
)

#: What routers may look at; how much of it is chosen when they are fitted.
ROUTER = dict(type='Router', pools=('mean', 'max', 'std'))
#: Dynamic variants: what differs from the dynamic config, whose exits are the first backbone at
#: half the size and both at the full one. `own` is `resolution` with a neck and heads for each
#: size.
DYNAMIC = dict(
    resolution={'model.backbones': 1, 'model.shared': True},
    depth={'model.first_scale': 1.0},
    depth_resolution={'model.shared': False},
    own={'model.backbones': 1, 'model.shared': False},
    triple={'model.first_scale': 1.0, 'model.backbones': 3},
)

#: Where the target comes from matters where images are known by heart: `depth`, trained on 1,000
#: images eight times over; and on each half of them alone, so that each half has a cascade that
#: never saw it.
FEW, TIMES = 1000, 8
HALVES = dict(half_a=range(FEW // 2), half_b=range(FEW // 2, FEW))

#: The test pipeline with what training could have seen otherwise: light, color, place.
AUGMENTED = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(DATA['size'], DATA['size']), keep_ratio=True),
    dict(type='PhotoMetricDistortion'),
    dict(type='RandomShift', prob=1.0, max_shift_px=8),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]

#: Plain detectors: side of the image, and what differs from the plain config. Those that are deeper
#: start from nothing, and are pretrained as the others were first.
SIZES = {'64': (64, {}), '96': (96, {}), '128': (128, {}), '160': (160, {})}
DEEPER = dict(
    yolox={'deeper': (128, {'model.backbone.deepen_factor': 1.0, 'model.neck.num_csp_blocks': 3})},
    faster_rcnn={
        'r34': (128, {'model.backbone.depth': 34}),
        'r50': (128, {'model.backbone.depth': 50, 'model.neck.in_channels': [128, 256, 512, 1024]}),
    },
)


class Run(NamedTuple):
    """One training."""

    detector: str
    variant: str
    seed: int
    config: str
    options: dict[str, object]
    #: Name of the run whose weights it starts from.
    start: str | None
    #: Names of runs whose records its numbers need.
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f'{self.detector}-{self.variant}-{self.seed}'

    @property
    def is_dynamic(self) -> bool:
        return self.variant in (*DYNAMIC, 'few', *HALVES)

    @property
    def records(self) -> dict[str, dict[str, object]]:
        """What its numbers are made of: name -> options of its config. The test set; for dynamic
        detectors also images to fit routers to: held out, trained on, trained on and seen
            otherwise, or those of the
        other half."""
        indices = 'train_dataloader.dataset.indices'
        if self.variant in HALVES:
            (other,) = (images for half, images in HALVES.items() if half != self.variant)
            return dict(other_half={indices: list(other)})
        if not self.is_dynamic:
            return dict(test={})
        records = dict(test={}, held_out={indices: -HELD_OUT}, train={indices: HELD_OUT})
        if self.variant == 'few':
            records['augmented'] = {indices: FEW, 'val_dataloader.dataset.pipeline': AUGMENTED}
        return records


def all_runs(root: str = DATA['root']) -> list[Run]:
    """All runs; what others start from first, then what says most."""
    runs = [_pretraining(name, '', {}, root) for name in DETECTORS]
    for seed in SEEDS:
        for name in DETECTORS:
            dynamic = [_dynamic(name, variant, seed, root) for variant in DYNAMIC]
            plain = [_plain(name, variant, seed, root) for variant in SIZES] if seed == 0 else []
            runs += dynamic[:2] + plain + dynamic[2:]
    runs += _few('yolox', root)
    for name, variants in DEEPER.items():
        for variant, (_, changes) in variants.items():
            runs += [
                _pretraining(name, f'_{variant}', changes, root),
                _plain(name, variant, 0, root),
            ]
    return runs


def _pretraining(name: str, suffix: str, changes: dict, root: str) -> Run:
    """Two epochs at all sizes of the experiment."""
    sizes = dict(
        type='BatchSyncRandomResize', random_size_range=(64, 160), size_divisor=32, interval=1
    )
    options = {
        **_schedule(DETECTORS[name].pretraining_lr, 2, PRETRAINING),
        **changes,
        'model.data_preprocessor.batch_augments': [sizes],
    }
    return _run(name, f'pretrained{suffix}', 0, DETECTORS[name].plain, 128, options, root, None)


def _dynamic(name: str, variant: str, seed: int, root: str) -> Run:
    options = {
        **_schedule(DETECTORS[name].lr, 1, FINE_TUNING),
        'model.router': ROUTER,
        **DYNAMIC[variant],
    }
    return _run(
        name,
        variant,
        seed,
        DETECTORS[name].dynamic,
        DATA['size'],
        options,
        root,
        f'{name}-pretrained-0',
    )


def _few(name: str, root: str) -> list[Run]:
    """The runs on few images: both halves, then all."""
    runs = []
    for variant, images in {
        **{half: list(images) for half, images in HALVES.items()},
        'few': FEW,
    }.items():
        options = {
            **_dynamic(name, 'depth', 0, root).options,
            **_schedule(DETECTORS[name].lr, TIMES, images),
        }
        needs = tuple(f'{name}-{half}-0' for half in HALVES) if variant == 'few' else ()
        runs.append(
            _dynamic(name, 'depth', 0, root)._replace(variant=variant, options=options, needs=needs)
        )
    return runs


def _plain(name: str, variant: str, seed: int, root: str) -> Run:
    suffix = '' if variant in SIZES else f'_{variant}'
    size, changes = {**SIZES, **DEEPER[name]}[variant]
    options = {**_schedule(DETECTORS[name].lr, 1, FINE_TUNING), **changes}
    return _run(
        name,
        f'plain_{variant}',
        seed,
        DETECTORS[name].plain,
        size,
        options,
        root,
        f'{name}-pretrained{suffix}-0',
    )


def _schedule(lr: float, epochs: int, images: object) -> dict[str, object]:
    return {
        'optim_wrapper.optimizer.lr': lr,
        'train_dataloader.dataset.indices': images,
        'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs,
        'param_scheduler.1.T_max': epochs,
    }


def _run(
    name: str,
    variant: str,
    seed: int,
    config: str,
    size: int,
    changes: dict[str, object],
    root: str,
    start: str | None,
) -> Run:
    options = {**data_options(root, size), 'randomness.seed': seed, **changes}
    return Run(name, variant, seed, config, options, start)


def data_options(root: str, size: int) -> dict[str, object]:
    """Point a config of the built-in data at this experiment's, delivered at a size."""
    options: dict[str, object] = {'train_dataloader.dataset.pipeline.2.scale': (size, size)}
    for split in ('val', 'test'):
        options[f'{split}_dataloader.dataset.pipeline.1.scale'] = (size, size)
        options[f'{split}_evaluator.ann_file'] = f'{root}/annotations/instances_{split}.json'
    for split in ('train', 'val', 'test'):
        options[f'{split}_dataloader.dataset.data_root'] = f'{root}/'
    return options

"""What tools/check_gpu.sh runs: the real tools on a small copy of the built-in data, then
measurements and tests."""

from collections.abc import Sequence
from typing import NamedTuple

#: Epochs of step 1 on 16 pictures: enough to detect something.
EPOCHS = 10
#: Configs that run.py writes, shrunk: of both steps under the names of their bases, which decide
#: work dirs.
DETECTOR, ROUTER, QAT = 'dy_faster_rcnn_digits.py', 'dy_faster_rcnn_digits_router.py', 'qat.py'
CONFIGS = {
    DETECTOR: """model = dict(
    backbone=dict(base_channels=8), detector=dict(neck=dict(in_channels=[8, 16, 32, 64])))
""",
    QAT: """model = dict(backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64]))
custom_hooks = _base_.custom_hooks + [dict(type='QuantizationHook')]
""",
}
CONFIGS[ROUTER] = CONFIGS[DETECTOR]
BASES = {DETECTOR: DETECTOR, ROUTER: ROUTER, QAT: 'faster_rcnn_digits.py'}
TRAINED = 'work_dirs/dy_faster_rcnn_digits_router/epoch_2.pth'
VIDEO = 'configs/video/early_exit_yolov5_digits.py'
VIDEO_TRAINED = 'work_dirs/early_exit_yolov5_digits/epoch_1.pth'
FRAMES = 'data/digits_video/val/0001'
ON_TRAINING_PICTURES = (
    'test_dataloader.dataset.ann_file=annotations/instances_train.json',
    'test_dataloader.dataset.data_prefix.img=train/',
    'test_evaluator.ann_file=data/digits/annotations/instances_train.json',
)
#: Shares of hard images.
BUDGETS = (0, 0.5, 1)


class Step(NamedTuple):
    """One process.

    Attributes:
        name (str): In the table and the JSON; its output goes to NAME.log, what it measures to
            NAME.json.
        command (tuple[str]): A Python file of the repository, and arguments. A config's name may be
            one.
        needs (Sequence[str]): Steps that must have passed.
        gpu (bool): Whether it says nothing without a GPU.
        hidden (bool): Whether the GPU is hidden from it.
        limit (float): Seconds that it may take on a GPU.
    """

    name: str
    command: tuple[str, ...]
    needs: Sequence[str] = ()
    gpu: bool = False
    hidden: bool = False
    limit: float = 60


def training(
    name: str,
    config: str,
    epochs: int,
    *arguments: str,
    needs: Sequence[str] = ('data',),
    gpu: bool = False,
    **settings: object,
) -> Step:
    """A run of tools/train.py on all of the small data; validated at its end."""
    settings = {
        'train_dataloader.dataset.indices': None,
        'train_dataloader.batch_size': 4,
        'optim_wrapper.optimizer.lr': 2e-3,
        'param_scheduler': '[]',
        'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs,
        'default_hooks.logger.interval': 1,
        **settings,
    }
    return Step(
        name,
        (
            'tools/train.py',
            config,
            *arguments,
            '--cfg-options',
            *(f'{key}={value}' for key, value in settings.items()),
        ),
        needs,
        gpu,
    )


def testing(share: float) -> Step:
    """A run of tools/test.py on the training pictures."""
    name = f'test_{share:g}'
    return Step(
        name,
        (
            'tools/test.py',
            ROUTER,
            TRAINED,
            '--hard-share',
            f'{share:g}',
            '--work-dir',
            f'work_dirs/{name}',
            '--cfg-options',
            *ON_TRAINING_PICTURES,
        ),
        ('calibrate',),
    )


def measuring(name: str, *arguments: str, **settings: object) -> Step:
    """A part of measure.py."""
    return Step(name, ('tools/check_gpu/measure.py', name, *arguments), **settings)


def all_steps(gpu: bool, provider: str) -> list[Step]:
    """The steps, in order.

    Args:
        gpu (bool): Whether there is a GPU. Without one what takes long on a CPU is smaller.
        provider (str): What runs graphs in ONNX Runtime, such as 'CUDAExecutionProvider'.
    """
    demo = (
        'tools/video_demo.py',
        FRAMES,
        VIDEO,
        VIDEO_TRAINED,
        '--gate',
        'ScoreGate',
        '--budget',
        'threshold=0.9',
        '--pred-score-thr',
        '0',
        '--out',
    )
    return [
        Step('operators', ('tools/check_gpu/measure.py', 'operators'), gpu=True),
        Step(
            'data',
            (
                'tools/make_digits.py',
                '--train',
                '16',
                '--val',
                '12',
                '--test',
                '12',
                '--size',
                '64',
            ),
        ),
        # Step 1 but for its last epoch, which comes after a resume.
        training('train', DETECTOR, EPOCHS - 1),
        training('resume', DETECTOR, EPOCHS, '--resume', needs=('train',)),
        training('train_amp', DETECTOR, 2, '--amp', '--work-dir', 'work_dirs/amp', gpu=True),
        training('train_router', ROUTER, 2, needs=('resume',)),
        training(
            'train_router_amp',
            ROUTER,
            2,
            '--amp',
            '--work-dir',
            'work_dirs/router_amp',
            needs=('resume',),
            gpu=True,
        ),
        Step('calibrate', ('tools/calibrate.py', ROUTER, TRAINED), ('train_router',)),
        *map(testing, BUDGETS),
        measuring('compare', ROUTER, TRAINED, needs=('calibrate',), gpu=True),
        Step('export', ('tools/export.py', ROUTER, TRAINED, '--out', 'exported'), ('calibrate',)),
        Step(
            'test_exported',
            (
                'tools/test_deployed.py',
                'exported',
                '--providers',
                provider,
                '--images',
                '4',
                '--work-dir',
                'work_dirs/test_exported',
                '--cfg-options',
                *ON_TRAINING_PICTURES,
            ),
            ('export',),
        ),
        measuring('compare_exported', ROUTER, TRAINED, 'exported', provider, needs=('export',)),
        training('qat', QAT, 1, needs=('data',)),
        Step(
            'export_int8',
            (
                'tools/export.py',
                QAT,
                'work_dirs/qat/epoch_1.pth',
                '--int8',
                '--out',
                'exported_int8',
            ),
            ('qat',),
        ),
        Step(
            'videos',
            (
                'tools/make_digits_video.py',
                '--train',
                '2',
                '--val',
                '2',
                '--test',
                '1',
                '--length',
                '12',
                '--size',
                '64',
                '--no-mp4',
            ),
        ),
        training('train_video', VIDEO, 1, needs=('videos',), load_from=None),
        Step('video', (*demo, 'gpu.mp4'), ('train_video',)),
        Step('video_on_cpu', (*demo, 'cpu.mp4'), ('train_video',), gpu=True, hidden=True),
        measuring(
            'compare_video', 'gpu.jsonl', 'cpu.jsonl', needs=('video', 'video_on_cpu'), gpu=True
        ),
        measuring('syncs', gpu=True, limit=90),
        measuring('timings', *(() if gpu else ('--small',)), limit=150),
        Step(
            'gpu_tests',
            ('-m', 'pytest', '-m', 'gpu', '-rs', '-q', 'tests/test_gpu'),
            gpu=True,
            limit=150,
        ),
    ]

"""What being dynamic costs, in time.

Overheads, all on inputs in memory and from preprocessing to boxes:

* exit 0 against the stock detector on what exit 0 sees: the router and the bookkeeping, at batch 1;
* batches of which half is hard against the mean of all-easy and all-hard ones: the parting of the
  batches, and two smaller passes in place of one;
* the same with hard images, or both kinds, collected over batches: see `apis.stream`.

And the same under other settings of the machine: numbers of threads, data types, memory formats.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

from ..apis.stream import Stream
from ..building import require_dynamic
from ..cascade.resolution import reduce_images
from ..cascade.weights import missing_of, require_complete
from ..checkpoints import read_checkpoint
from ..compression.shrinking import resize_channels
from ..datasets.digits import load_sources, make_image
from ..errors import UsageError
from ..models import DynamicDetector
from ..models.budget_control import BudgetControl, build_budget_controller
from ..models.pairs import each_exit
from ..models.resolution import reduce_samples
from ..progress import Progress
from ..routing.thresholds import ALL_EASY, ALL_HARD, Thresholds, threshold_for_share
from ..testing import randomize
from ..timing import now
from .calibration import plain_exits

#: The overheads that the project allows itself (experiments/overhead.md).
WANTED = dict(exit0_to_stock=1.03, mixed_to_mean=1.1, stream_to_mean=1.05)
#: Images of a mixed batch.
BATCH_SIZE = 8
#: Untimed rounds: memory is allocated in the first; cuDNN chooses its algorithms in it.
_WARM_UP = 2


#: How a list of batches is worked off: batch by batch at a fixed threshold (a hard share of a
#: calibration is one, too); so, with a controller that holds half hard; as a stream that collects
#: hard images; one that collects easy ones, too.
POLICIES = ('threshold', 'online', 'stream', 'stream_all')

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
FORMATS = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)


class MachineSetting(NamedTuple):
    """How the machine is used.

    Attributes:
        threads (int): Of torch on the CPU.
        dtype (str): A key of `DTYPES`; all but float32 by autocast, as AMP does.
        memory_format (str): A key of `FORMATS`, of images and weights.
    """

    threads: int
    dtype: str = 'float32'
    memory_format: str = 'contiguous'

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Use the machine like this inside a ``with`` block; ``device`` is where models are."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.autocast(device.type, DTYPES[self.dtype], enabled=self.dtype != 'float32'):
                yield
        finally:
            torch.set_num_threads(before)


class BenchmarkTask(NamedTuple):
    """What is timed: one detector on some batches.

    Attributes:
        detector (BaseDetector): In eval mode.
        batches (list[dict]): Each as a data loader gives it.
        threshold (float or list[float], optional): Set before the clock starts. None for stock
            detectors.
        policy (str): One of `POLICIES`.
        setting (MachineSetting, optional): Defaults to what torch is set to.
    """

    detector: BaseDetector
    batches: list[dict]
    threshold: Thresholds | None = None
    policy: str = 'threshold'
    setting: MachineSetting | None = None


def build_pair(
    cfg: Config, checkpoint: str | None = None, device: str = 'cpu', seed: int = 0
) -> tuple[DynamicDetector, BaseDetector]:
    """Build a config's dynamic detector, and the stock detector that its exit 0 is.

    Args:
        cfg (Config): Of a dynamic detector.
        checkpoint (str, optional): Its checkpoint, or the plain detector's. Defaults to random
            weights.
        device (str): Such as 'cpu' or 'cuda:0'.
        seed (int): Of the random weights.

    Returns:
        tuple: Both in eval mode, over the same tensors.

    Raises:
        UsageError: If the config is of no dynamic detector or the checkpoint does not fit.
    """
    require_dynamic(cfg)
    init_default_scope('mmdet')
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model)
    if checkpoint:
        state = read_checkpoint(checkpoint)['state_dict']
        require_complete(model, state, missing_of(state))
        model.load_state_dict(state, strict=False)
    else:
        randomize(model, seed)
    model = model.to(device).eval()
    return model, build_stock(cfg.model, model).to(device).eval()


def build_stock(settings: Mapping, model: DynamicDetector) -> BaseDetector:
    """Build the stock detector of a dynamic one's config, over the tensors of its exit 0.

    The same tensors, not copies: where a tensor lies in memory has an effect on speed. Where exit 0
    sees a smaller image, so does the stock detector; where it has lost channels, so has the stock
    detector.
    """
    whole = settings['detector'] if settings['type'] == 'PrunedDetector' else settings
    detector = copy.deepcopy(each_exit(whole['detector'])[0])
    backbone = each_exit(whole.get('backbone'))[0]
    detector['backbone'] = copy.deepcopy(backbone or detector['backbone'])
    stock = MODELS.build(detector)
    resize_channels(stock, _of_exit0(getattr(model, 'removed_channels', {})))
    stock.load_state_dict(_of_exit0(model.state_dict()), assign=True)
    stock.data_preprocessor = _FirstView(model)
    return stock


def _of_exit0(named: Mapping[str, object]) -> dict[str, object]:
    """What belongs to exit 0, by the stock detector's names."""
    return {
        plain + name[len(prefix) :]: value
        for name, value in named.items()
        for prefix, plain in (('backbone.first.', 'backbone.'), ('branches.0.', ''))
        if name.startswith(prefix)
    }


class _Refused(UsageError):
    """A setting that this detector cannot have."""


def with_memory_format(model: DynamicDetector, memory_format: str) -> DynamicDetector:
    """A detector whose weights and images lie in memory as asked for: itself if contiguous, else a
    copy.

    Raises:
        UsageError: If it has a RoI head: mmcv's RoIAlign misreads maps that are not contiguous, on
            the CPU.
    """
    if memory_format == 'contiguous':
        return model
    if hasattr(model.branches[0], 'roi_head'):
        raise _Refused(
            f"{memory_format} is for one-stage detectors: mmcv's RoIAlign takes contiguous maps "
            'only'
        )
    model = copy.deepcopy(model).to(memory_format=FORMATS[memory_format])

    def lay_out(module, inputs, data: dict) -> dict:
        return dict(data, inputs=data['inputs'].contiguous(memory_format=FORMATS[memory_format]))

    model.data_preprocessor.register_forward_hook(lay_out)
    return model


class _FirstView(nn.Module):
    """A dynamic detector's preprocessing, down to what its exit 0 sees."""

    def __init__(self, model: DynamicDetector) -> None:
        super().__init__()
        self.preprocessor, self.scale, self.stride = (
            model.data_preprocessor,
            model.first_scale,
            model.stride,
        )

    def forward(self, data: dict, training: bool = False) -> dict:
        data = self.preprocessor(data, training)
        images, ratio = reduce_images(data['inputs'], self.scale, self.stride)
        return dict(inputs=images, data_samples=reduce_samples(data['data_samples'], ratio))


def make_batch(size: Sequence[int], count: int = BATCH_SIZE, seed: int = 0) -> dict:
    """Pictures of the built-in data set, every other one hard, without annotations.

    Args:
        size (Sequence[int]): Height and width. Pictures are made square and cut.
        count (int): How many.
        seed (int): Of the pictures.

    Returns:
        dict: As a data loader gives it: ``inputs``, uint8 (3, H, W) each, and ``data_samples``.
    """
    height, width = size
    sources = load_sources()
    batch = dict(inputs=[], data_samples=[])
    for index in range(count):
        picture = make_image(sources, 'val', index, max(size), seed)[0][:height, :width]
        batch['inputs'].append(torch.from_numpy(picture.transpose(2, 0, 1).copy()))
        batch['data_samples'].append(
            DetDataSample(
                metainfo=dict(
                    img_id=index,
                    img_shape=(height, width),
                    ori_shape=(height, width),
                    scale_factor=(1.0, 1.0),
                )
            )
        )
    return batch


def split_batch(batch: dict) -> list[dict]:
    """The images of a batch as batches of one."""
    return [
        dict(inputs=[image], data_samples=[sample])
        for image, sample in zip(batch['inputs'], batch['data_samples'])
    ]


@torch.no_grad()
def require_equal(stock: BaseDetector, model: DynamicDetector, batches: Sequence[dict]) -> int:
    """Check that exit 0 does the stock detector's work: bit-equal boxes, scores and labels, before
    scores are scaled.

    Returns:
        int: How many boxes were compared.

    Raises:
        RuntimeError: If anything differs. Times would not be comparable.
    """
    compared = 0
    model.set_budget(threshold=ALL_EASY)
    for batch in batches:
        with plain_exits(model):
            pairs = zip(stock.test_step(batch), model.test_step(batch))
        for expected, other in ((a.pred_instances, b.pred_instances) for a, b in pairs):
            if not all(
                torch.equal(expected[key], other[key]) for key in ('bboxes', 'scores', 'labels')
            ):
                raise RuntimeError(
                    'exit 0 does not find what the stock detector finds: their times cannot be '
                    'compared'
                )
            compared += len(expected)
    return compared


@torch.no_grad()
def half_hard_threshold(model: DynamicDetector, batches: Sequence[dict]) -> float:
    """The median difficulty of all images of some batches.

    Raises:
        UsageError: If that does not part them in halves.
    """
    scores = []
    for batch in batches:
        data = model.data_preprocessor(batch, False)
        scores += model.score(data['inputs'], data['data_samples']).tolist()
    threshold = threshold_for_share(scores, 0.5)
    hard = sum(score > threshold for score in scores)
    if 2 * hard != len(scores):
        raise UsageError(
            f'{hard} of {len(scores)} images are hard, not half of them: too many have the same '
            'difficulty; try another checkpoint or another seed'
        )
    return threshold


@torch.no_grad()
def time_interleaved(
    tasks: Mapping[object, BenchmarkTask], rounds: int, progress: Progress, what: str
) -> dict[object, np.ndarray]:
    """Time tasks in turns: each once a round, in many orders one after the other.

    Args:
        tasks (Mapping[object, BenchmarkTask]): What to time, by name.
        rounds (int): Timed rounds; some untimed ones come first.
        progress (Callable): Wraps what is iterated over.
        what (str): What the progress says.

    Returns:
        dict: Name -> seconds in each round, (rounds,). Those of one round belong together.
    """
    orders = _orders(list(tasks))
    times: dict[object, list[float]] = {name: [] for name in tasks}
    for turn in progress(range(-_WARM_UP, rounds), what):
        for name in orders[turn % len(orders)]:
            seconds = _time(tasks[name])
            if turn >= 0:
                times[name].append(seconds)
    return {name: np.asarray(values) for name, values in times.items()}


def _orders(names: list) -> list[list]:
    """All of them for a few; for many, those where each comes first once, forwards and
    backwards."""
    if len(names) <= 3:
        return [list(order) for order in itertools.permutations(names)]
    turned = [names[at:] + names[:at] for at in range(len(names))]
    return [order for rotation in turned for order in (rotation, rotation[::-1])]


def _time(task: BenchmarkTask) -> float:
    detector = task.detector
    if task.threshold is not None:
        detector.set_budget(threshold=task.threshold)
    device = next(detector.parameters()).device
    with contextlib.ExitStack() as stack:
        if task.setting is not None:
            stack.enter_context(task.setting.on(device))
        if task.policy == 'online':
            stack.enter_context(
                BudgetControl(detector, build_budget_controller(detector, dict(hard_share=0.5)))
            )
        start = now(device)
        if task.policy.startswith('stream'):
            size = len(task.batches[0]['inputs'])
            with Stream(detector, size, collect_easy=task.policy == 'stream_all') as stream:
                for _ in stream.run(task.batches):
                    pass
        else:
            for batch in task.batches:
                detector.test_step(batch)
        return now(device) - start


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return dict(median=median, q1=low, q3=high)


def measure_benchmark(
    model: DynamicDetector,
    settings: Mapping,
    batches: Sequence[dict],
    rounds: int,
    batch_rounds: int,
    progress: Progress,
    ways: Sequence[MachineSetting] = (),
) -> list[dict]:
    """Measure all overheads, and the latency of each exit, under each setting, all taking turns.

    Args:
        model (DynamicDetector): In eval mode.
        settings (Mapping): The config's model, for the stock detector.
        batches (Sequence[dict]): See `make_batch`; of one size. At batch 1, the first image counts.
        rounds (int): Timed rounds at batch 1.
        batch_rounds (int): Timed rounds of all batches.
        progress (Callable): Wraps what is iterated over.
        ways (Sequence[MachineSetting]): Defaults to what torch is set to, alone.

    Returns:
        list[dict]: Per setting ``threads``, ``dtype``, ``memory_format``; ``seconds`` per call (of
            one image, of all batches), by what was timed; ``ratios``, by the keys of `WANTED`, both
            sides of each from one round; all with ``median``, ``q1`` and ``q3``;
            ``boxes_compared``. Or ``refused``, why that setting cannot be.

    Raises:
        RuntimeError: If exit 0 and the stock detector differ.
        UsageError: If the images' difficulties do not part the batches in halves.
    """
    ways = list(ways) or [MachineSetting(torch.get_num_threads())]
    rows, single, whole, formatted = {}, {}, {}, {}
    for way in ways:
        try:
            if way.memory_format not in formatted:
                dynamic = with_memory_format(model, way.memory_format)
                formatted[way.memory_format] = (
                    dynamic,
                    build_stock(settings, dynamic).to(_device(dynamic)).eval(),
                )
            boxes, tasks, batch_tasks = _tasks(*formatted[way.memory_format], batches, way)
        except (UsageError, RuntimeError, NotImplementedError) as error:
            if not _is_refusal(error):
                raise
            reason = str(error).splitlines()[0]
            if not isinstance(error, UsageError):
                reason = f"an operator of mmcv's lacks {way.dtype} on this device: {reason}"
            rows[way] = dict(way._asdict(), refused=reason)
            continue
        rows[way] = dict(way._asdict(), boxes_compared=boxes)
        single.update(tasks)
        whole.update(batch_tasks)
    seconds = time_interleaved(single, rounds, progress, 'batch 1')
    seconds.update(time_interleaved(whole, batch_rounds, progress, 'whole batches'))
    for way, row in rows.items():
        if 'refused' not in row:
            row.update(
                _summary(
                    {name: values for (owner, name), values in seconds.items() if owner == way}
                )
            )
    return list(rows.values())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _is_refusal(error: Exception) -> bool:
    """Whether an operator lacks a data type, or a format was refused, rather than something being
    wrong."""
    message = str(error)
    return (
        isinstance(error, _Refused)
        or 'not implemented for' in message
        or 'expected scalar type' in message
    )


@torch.no_grad()
def _tasks(
    model: DynamicDetector, stock: BaseDetector, batches: Sequence[dict], way: MachineSetting
) -> tuple[int, dict[tuple, BenchmarkTask], dict[tuple, BenchmarkTask]]:
    """Boxes that were compared; what is timed on one image; what on all batches."""
    first, *others = split_batch(batches[0])
    with way.on(_device(model)):
        boxes = require_equal(stock, model, [first, *others, batches[0]])
        middle = half_hard_threshold(model, batches)
        # Every operator once, under the data type.
        model.set_budget(threshold=ALL_HARD)
        model.test_step(first)
    single = dict(stock=BenchmarkTask(stock, [first]))
    single.update(
        {
            f'exit{exit}': BenchmarkTask(model, [first], _leaving_at(exit, model.num_exits))
            for exit in range(model.num_exits)
        }
    )
    whole = dict(
        all_easy=BenchmarkTask(model, batches, ALL_EASY),
        half_hard=BenchmarkTask(model, batches, middle),
        all_hard=BenchmarkTask(model, batches, ALL_HARD),
    )
    whole.update({policy: BenchmarkTask(model, batches, middle, policy) for policy in POLICIES[1:]})
    return boxes, *(
        {(way, name): task._replace(setting=way) for name, task in tasks.items()}
        for tasks in (single, whole)
    )


def _leaving_at(exit: int, exits: int) -> Thresholds:
    """Thresholds with which every image leaves at one exit."""
    thresholds = [ALL_HARD] * exit + [ALL_EASY] * (exits - 1 - exit)
    return thresholds[0] if exits == 2 else thresholds


def _summary(seconds: Mapping[str, np.ndarray]) -> dict[str, dict]:
    ideal = (seconds['all_easy'] + seconds['all_hard']) / 2
    ratios = dict(
        exit0_to_stock=seconds['exit0'] / seconds['stock'],
        mixed_to_mean=seconds['half_hard'] / ideal,
        stream_to_mean=seconds['stream'] / ideal,
        stream_all_to_mean=seconds['stream_all'] / ideal,
    )
    return dict(
        seconds={name: quartiles(values) for name, values in seconds.items()},
        ratios={name: quartiles(values) for name, values in ratios.items()},
    )

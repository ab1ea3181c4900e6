"""What being dynamic costs, in time.

Two overheads, both on inputs in memory and from preprocessing to boxes:

* exit 0 against the stock detector on what exit 0 sees: the router and the bookkeeping, at batch 1;
* a batch of which half is hard against the mean of an all-easy and an all-hard one: the parting
  of the batch, and two smaller passes in place of one.
"""
import copy
import itertools
import time
from typing import Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

from ..checkpoints import is_plain, read_checkpoint, require_complete
from ..datasets.digits import load_sources, make_image
from ..errors import UsageError
from ..models import DynamicDetector
from ..models.resolution import reduce_images, reduce_samples
from ..routing.thresholds import ALL_EASY, ALL_HARD, threshold_for_share
from ..testing import randomise

Progress = Callable[[Iterable, str], Iterable]

#: The overheads that the project allows itself (docs/benchmarks.md).
WANTED = dict(exit0_to_stock=1.03, mixed_to_mean=1.1)
#: Images of the mixed batch.
BATCH_SIZE = 8
#: Untimed rounds: memory is allocated in the first; cuDNN chooses its algorithms in it.
_WARM_UP = 2


class Task(NamedTuple):
    """What is timed: one detector on one batch.

    Attributes:
        detector (BaseDetector): In eval mode.
        batch (dict): As a data loader gives it.
        threshold (float, optional): Set before the clock starts. None for stock detectors.
    """
    detector: BaseDetector
    batch: dict
    threshold: Optional[float] = None


def build_pair(cfg: Config,
               checkpoint: Optional[str] = None,
               device: str = 'cpu',
               seed: int = 0) -> Tuple[DynamicDetector, BaseDetector]:
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
    if cfg.model.type != 'DynamicDetector':
        raise UsageError(f"the config's model must be a DynamicDetector, not {cfg.model.type}")
    init_default_scope('mmdet')
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model)
    if checkpoint:
        state = read_checkpoint(checkpoint)['state_dict']
        # A plain detector has no more than the two exits share with it.
        own = ('backbone.connections.', 'router.') if is_plain(state) else ()
        require_complete(model, state, own)
        model.load_state_dict(state, strict=False)
    else:
        randomise(model, seed)
    model = model.to(device).eval()
    return model, build_stock(cfg.model, model).to(device).eval()


def build_stock(settings: Mapping, model: DynamicDetector) -> BaseDetector:
    """Build the stock detector of a dynamic one's config, over the tensors of its exit 0.

    The same tensors, not copies: where a tensor lies in memory has an effect on speed. Where exit 0
    sees a smaller image, so does the stock detector.
    """
    detector = copy.deepcopy(settings['detector'])
    detector['backbone'] = copy.deepcopy(settings.get('backbone') or detector['backbone'])
    stock = MODELS.build(detector)
    state = {}
    for key, value in model.state_dict().items():
        for own, plain in (('backbone.first.', 'backbone.'), ('branches.0.', '')):
            if key.startswith(own):
                state[plain + key[len(own):]] = value
    stock.load_state_dict(state, assign=True)
    stock.data_preprocessor = _FirstView(model)
    return stock


class _FirstView(nn.Module):
    """A dynamic detector's preprocessing, down to what its exit 0 sees."""

    def __init__(self, model: DynamicDetector) -> None:
        super().__init__()
        self.preprocessor, self.scale, self.stride = model.data_preprocessor, model.first_scale, model.stride

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
                    scale_factor=(1.0, 1.0))))
    return batch


def split_batch(batch: dict) -> List[dict]:
    """The images of a batch as batches of one."""
    return [dict(inputs=[image], data_samples=[sample])
            for image, sample in zip(batch['inputs'], batch['data_samples'])]


@torch.no_grad()
def require_equal(stock: BaseDetector, model: DynamicDetector, batches: Sequence[dict]) -> int:
    """Check that exit 0 does the stock detector's work: bit-equal boxes, scores and labels.

    Returns:
        int: How many boxes were compared.

    Raises:
        RuntimeError: If anything differs. Times would not be comparable.
    """
    compared = 0
    model.set_budget(threshold=ALL_EASY)
    for batch in batches:
        pairs = zip(stock.test_step(batch), model.test_step(batch))
        for one, other in ((a.pred_instances, b.pred_instances) for a, b in pairs):
            if not all(torch.equal(one[key], other[key]) for key in ('bboxes', 'scores', 'labels')):
                raise RuntimeError('exit 0 does not find what the stock detector finds: '
                                   'their times cannot be compared')
            compared += len(one)
    return compared


@torch.no_grad()
def half_hard_threshold(model: DynamicDetector, batch: dict) -> float:
    """The median difficulty of a batch.

    Raises:
        UsageError: If that does not part the batch in halves.
    """
    data = model.data_preprocessor(batch, False)
    scores = model.score(data['inputs'], data['data_samples'])
    threshold = threshold_for_share(scores.tolist(), 0.5)
    hard = int((scores > threshold).sum())
    if 2 * hard != len(scores):
        raise UsageError(f'{hard} of {len(scores)} images are hard, not half of them: too many '
                         'have the same difficulty; try another checkpoint or another seed')
    return threshold


@torch.no_grad()
def interleave(tasks: Mapping[str, Task],
               rounds: int,
               progress: Progress,
               what: str) -> Dict[str, np.ndarray]:
    """Time tasks in turns: each once a round, in all orders one after the other.

    Args:
        tasks (Mapping[str, Task]): What to time, by name.
        rounds (int): Timed rounds; some untimed ones come first.
        progress (Callable): Wraps what is iterated over.
        what (str): What the progress says.

    Returns:
        dict: Name -> seconds in each round, (rounds,). Those of one round belong together.
    """
    orders = list(itertools.permutations(tasks))
    times: Dict[str, List[float]] = {name: [] for name in tasks}
    for turn in progress(range(-_WARM_UP, rounds), what):
        for name in orders[turn % len(orders)]:
            seconds = _time(tasks[name])
            if turn >= 0:
                times[name].append(seconds)
    return {name: np.asarray(values) for name, values in times.items()}


def _time(task: Task) -> float:
    if task.threshold is not None:
        task.detector.set_budget(threshold=task.threshold)
    cuda = next(task.detector.parameters()).is_cuda
    synchronise = torch.cuda.synchronize if cuda else lambda: None
    synchronise()
    start = time.perf_counter()
    task.detector.test_step(task.batch)
    synchronise()
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> Dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return dict(median=median, q1=low, q3=high)


def measure(model: DynamicDetector,
            stock: BaseDetector,
            batch: dict,
            rounds: int,
            batch_rounds: int,
            progress: Progress) -> Dict[str, dict]:
    """Measure both overheads, and the latency of each exit.

    Args:
        model (DynamicDetector): In eval mode.
        stock (BaseDetector): See `build_pair`.
        batch (dict): See `make_batch`. At batch 1, its first image counts.
        rounds (int): Timed rounds at batch 1.
        batch_rounds (int): Timed rounds of the whole batch.
        progress (Callable): Wraps what is iterated over.

    Returns:
        dict: ``seconds`` per call, by what was timed; ``ratios``, by the keys of `WANTED`, both
        sides of each from one round; all with ``median``, ``q1`` and ``q3``. ``boxes_compared``.

    Raises:
        RuntimeError: If exit 0 and the stock detector differ.
        UsageError: If the images' difficulties do not part the batch in halves.
    """
    single, *others = split_batch(batch)
    boxes = require_equal(stock, model, [single, *others, batch])
    middle = half_hard_threshold(model, batch)
    seconds = interleave(
        dict(stock=Task(stock, single), exit0=Task(model, single, ALL_EASY),
             exit1=Task(model, single, ALL_HARD)), rounds, progress, 'batch 1')
    seconds.update(interleave(
        dict(all_easy=Task(model, batch, ALL_EASY), half_hard=Task(model, batch, middle),
             all_hard=Task(model, batch, ALL_HARD)), batch_rounds, progress, 'whole batches'))
    ratios = dict(
        exit0_to_stock=seconds['exit0'] / seconds['stock'],
        mixed_to_mean=2 * seconds['half_hard'] / (seconds['all_easy'] + seconds['all_hard']))
    return dict(
        seconds={name: quartiles(values) for name, values in seconds.items()},
        ratios={name: quartiles(values) for name, values in ratios.items()},
        boxes_compared=boxes)

"""Detect on a stream: hard images of several batches run together, results come in the order of the
images.

The first backbone and the router run on each batch. Images that leave at the first exit are done
with their batch; the others wait, feature maps in memory, until a full batch of them is there or
one has waited too long.
"""

import contextlib
import numbers
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdet.structures import DetDataSample, SampleList

from ..cascade.batch_state import BatchState, join_batch_states
from ..errors import UsageError
from ..models import DynamicDetector
from ..models.budget_control import BudgetControl
from ..routing.budget_controller import BudgetController
from ..timing import now


@dataclass
class _Arrived:
    """An image that no backbone has seen yet."""

    number: int
    time: float
    image: Tensor
    sample: DetDataSample


@dataclass
class _Waiting:
    """One image on its way: who it is, since when it is here, and its maps."""

    number: int
    time: float
    state: BatchState


class Stream:
    """A detector at work on a stream. Use it in a ``with`` block, by `run`, or by `put`, `poll` and
    `flush`.

    Memory: fewer than ``batch_size`` images before the first backbone, and the maps of fewer than
    ``(K - 1) * hard_batch + batch_size`` images behind it. Images of other padded sizes wait in
    groups of their own; where too many wait in all, the largest group runs before it is full. Where
    exits are merged, what images found so far waits with them, masks too.

    Args:
        model (DynamicDetector): In eval mode. Its budget counts where there is no controller.
        batch_size (int): Images of the first pass. Defaults to 8.
        hard_batch (int, optional): Images of the later passes. Defaults to ``batch_size``.
        collect_easy (bool): Whether images that leave at the first exit also wait until
            ``batch_size`` of them are there, for its neck and heads. Where exits are merged these
            run with the first pass, and nobody waits. Defaults to False.
        deadline (float, optional): Seconds since its arrival after which an image waits for no
            other. It is looked at in every call; `run` also looks while its source pauses. Defaults
            to None: an image waits until its batch is full, or for the end.
        most_behind (int): How many later images may come before one waits no longer: their results
            wait behind it. Defaults to 1024.
        controller (BudgetController, optional): Sets the thresholds; told the time that the
            detector works.
        clock (Callable): Seconds, never back. Defaults to ``time.monotonic``.
        in_order (bool): Whether results come in the order of the images. If not, none waits for
            another's, and only results that name their image are of use. Defaults to True.
        on_pass (Callable, optional): Told of each pass: 'first', 'later' or 'finish', its seconds
            and images.

    Raises:
        UsageError: If a number is out of range.

    Example:
        >>> with Stream(model, hard_batch=8, deadline=0.5) as stream:
        ...     for sample in stream.run(loader):
        ...         print(sample.img_path, sample.exit)
    """

    def __init__(
        self,
        model: DynamicDetector,
        batch_size: int = 8,
        hard_batch: int | None = None,
        collect_easy: bool = False,
        deadline: float | None = None,
        most_behind: int = 1024,
        controller: BudgetController | None = None,
        clock: Callable[[], float] = time.monotonic,
        in_order: bool = True,
        on_pass: Callable[[str, float, int], None] | None = None,
    ) -> None:
        hard_batch = batch_size if hard_batch is None else hard_batch
        if not all(
            isinstance(number, numbers.Integral) and number >= 1
            for number in (batch_size, hard_batch, most_behind)
        ):
            raise UsageError(
                'batch_size, hard_batch and most_behind must be whole numbers, 1 or more; got '
                f'{batch_size}, {hard_batch} and {most_behind}'
            )
        # Not `deadline < 0`, which lets NaN pass.
        if deadline is not None and not deadline >= 0:
            raise UsageError(f'a deadline is seconds, 0 or more; got {deadline}')
        self.model, self.controller, self.clock = model, controller, clock
        self.batch_size, self.hard_batch, self.collect_easy = batch_size, hard_batch, collect_easy
        self.deadline, self.most_behind = deadline, most_behind
        self.in_order, self.on_pass = in_order, on_pass
        # Around each first pass alone: between batches the detector is its owner's.
        self._routing = (
            contextlib.nullcontext()
            if controller is None
            else BudgetControl(model, controller, timed=False)
        )
        self._arrived: list[_Arrived] = []
        # By what can be joined: those before a backbone, and those before an exit's neck and heads.
        self._groups: dict[tuple, list[_Waiting]] = {}
        self._done: dict[int, DetDataSample] = {}
        self._count, self._next, self._busy = 0, 0, 0.0

    def __enter__(self) -> 'Stream':
        return self

    def __exit__(self, *_) -> None:
        """Forget what still waits."""
        self._arrived, self._groups, self._done = [], {}, {}
        self._next = self._count

    def run(self, batches: Iterable[dict | None]) -> Iterator[DetDataSample]:
        """Detect in all images of a source, in its order.

        Args:
            batches (Iterable[dict]): Of any number of images each, as a data loader gives them;
                None where there is nothing yet. With a deadline it is read in a thread of its own,
                one batch ahead, so that the deadline holds while it pauses.

        Yields:
            DetDataSample: As ``predict`` gives it, as soon as it and all before it are done. Where
                the source fails, all that came before first; then its error is raised.
        """
        batches = iter(batches) if self.deadline is None else _watch(batches, self.due)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception:
                # The source's own, whatever it is: after what came before.
                yield from self.flush()
                raise
            yield from self.poll() if batch is None else self.put(batch)
        yield from self.flush()

    def put(self, batch: dict) -> SampleList:
        """Take images; give the results that are ready.

        Args:
            batch (dict): ``inputs``, (3, H, W) each, and ``data_samples``, as a data loader gives
                them.

        Returns:
            list[DetDataSample]: Results of this and earlier calls, in the order of the images.

        Raises:
            UsageError: If it is no such batch.
        """
        _require_batch(batch)
        arrival = self.clock()
        for image, sample in zip(batch['inputs'], batch['data_samples']):
            self._arrived.append(_Arrived(self._count, arrival, image, sample))
            self._count += 1
            if len(self._arrived) == self.batch_size:
                self._first_pass()
        return self.poll()

    def poll(self) -> SampleList:
        """Run what must wait no longer; give the results that are ready."""
        if self._arrived and self._is_due(self._arrived[0]):
            self._first_pass()
        for key in list(self._groups):
            if any(self._is_due(waiting) for waiting in self._groups.get(key, ())):
                self._run(key)
        return self._ready()

    def step(self) -> SampleList:
        """Run one batch of what waits, full or not: the first pass before later ones; give the
        results that are ready. For owners who would rather compute than idle."""
        if self._arrived:
            self._first_pass()
        elif self._groups:
            self._run(max(self._groups, key=lambda key: len(self._groups[key])))
        return self.poll()

    def flush(self) -> SampleList:
        """Run all that waits; give all results that are left."""
        if self._arrived:
            self._first_pass()
        while self._groups:
            self._run(next(iter(self._groups)))
        return self._ready()

    def due(self) -> float | None:
        """Seconds until the next deadline, 0 if it has passed; None without a deadline or anything
        that waits."""
        times = [arrived.time for arrived in self._arrived[:1]]
        times += [waiting.time for group in self._groups.values() for waiting in group]
        if self.deadline is None or not times:
            return None
        return max(0.0, min(times) + self.deadline - self.clock())

    @property
    def arrived(self) -> int:
        """How many images no backbone has seen yet."""
        return len(self._arrived)

    @property
    def waiting(self) -> int:
        """How many images have maps in memory."""
        return sum(len(group) for group in self._groups.values())

    def _is_due(self, image) -> bool:
        late = self.deadline is not None and self.clock() - image.time >= self.deadline
        return late or self._count - image.number > self.most_behind

    def _ready(self) -> SampleList:
        ready = []
        if not self.in_order:
            ready, self._done = list(self._done.values()), {}
            self._next = self._count
        while self._next in self._done:
            ready.append(self._done.pop(self._next))
            self._next += 1
        return ready

    @torch.no_grad()
    def _first_pass(self) -> None:
        images, self._arrived = self._arrived, []
        with self._working('first', len(images)):
            data = dict(
                inputs=[arrived.image for arrived in images],
                data_samples=[arrived.sample for arrived in images],
            )
            data = self.model.data_preprocessor(data, False)
            with self._routing:
                state = self.model.start(data['inputs'], data['data_samples'])
            self._part(state, images, self.collect_easy)
        while True:
            # Full ones, or the largest where too many wait in all.
            key = max(
                self._groups,
                key=lambda group_key: len(self._groups[group_key]) / self._full(group_key),
                default=None,
            )
            most = (
                self.model.num_exits - 1
            ) * self.hard_batch + self.collect_easy * self.batch_size
            if key is None or len(self._groups[key]) < self._full(key) and self.waiting < most:
                break
            self._run(key)
        if self.controller is not None:
            # With the images that came in: what they left undone is in the time of the next.
            self.controller.measure(self._busy, len(images))
            self._busy = 0.0

    def _full(self, key: tuple) -> int:
        return self.batch_size if key[0] == 'finish' else self.hard_batch

    @torch.no_grad()
    def _run(self, key: tuple) -> None:
        """Run a group, as many of it as make a batch."""
        group, full = self._groups.pop(key), self._full(key)
        if group[full:]:
            self._groups[key] = group[full:]
        group = group[:full]
        with self._working('finish' if key[0] == 'finish' else 'later', len(group)):
            state = join_batch_states([waiting.state for waiting in group])
            if key[0] == 'finish':
                self._finish(state, group)
            else:
                self._part(self.model.deepen(state), group, False)

    def _part(self, state: BatchState, owners: list, collect: bool) -> None:
        """Let those who leave here leave, or wait for others who do; let the others wait."""
        if self.model.merge:
            # The necks and heads run on all images here: nobody need wait for them.
            self.model.detect(state)
            collect = False
        leaving = [row for row, exit in enumerate(state.exits) if exit == state.exit]
        going_on = [row for row, exit in enumerate(state.exits) if exit > state.exit]
        if leaving and not collect:
            self._finish(state.take(leaving), [owners[row] for row in leaving])
        for row in going_on + (leaving if collect else []):
            single = state.take([row])
            key = ('finish' if row in leaving else 'deepen', *single.shapes)
            self._groups.setdefault(key, []).append(
                _Waiting(owners[row].number, owners[row].time, single)
            )

    def _finish(self, state: BatchState, owners: list) -> None:
        for owner, sample in zip(owners, self.model.finish(state)):
            self._done[owner.number] = sample

    @contextlib.contextmanager
    def _working(self, what: str, images: int) -> Iterator[None]:
        """Count the time for the controller, and tell of the pass."""
        if self.controller is None and self.on_pass is None:
            yield
            return
        start = now(self.model.threshold.device)
        yield
        seconds = now(self.model.threshold.device) - start
        self._busy += seconds
        if self.on_pass is not None:
            self.on_pass(what, seconds, images)


def _require_batch(batch: dict) -> None:
    """Refuse what is no batch before any of it is taken: later it would fail among other images."""
    images, samples = (
        batch.get(key) if isinstance(batch, Mapping) else None for key in ('inputs', 'data_samples')
    )
    if images is None or samples is None or len(images) != len(samples):
        raise UsageError(
            'a batch has inputs and data_samples, one of each for an image, as a data loader '
            'gives them; got '
            f'{batch if images is None else f"{len(images)} and {len(samples or ())}"}'[:200]
        )
    for image in images:
        if (
            not isinstance(image, Tensor)
            or image.dim() != 3
            or image.shape[0] != 3
            or not image.numel()
        ):
            shape = f'{type(image).__name__} {tuple(getattr(image, "shape", ()))}'
            raise UsageError(f'an image of a stream is a tensor (3, height, width); got {shape}')


def _watch(source: Iterable, due: Callable[[], float | None]) -> Iterator:
    """What a source gives, and None whenever the time that ``due`` says has passed without
    anything.

    The source is read in a thread. Its errors are raised here.
    """
    items: queue.Queue = queue.Queue(maxsize=1)
    stop, end = threading.Event(), object()

    def hand_over(item: tuple) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return items.put(item, timeout=0.1)

    def read() -> None:
        try:
            for item in source:
                hand_over((item, None))
                if stop.is_set():
                    return
            hand_over((end, None))
        except BaseException as error:
            hand_over((end, error))

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                wait = due()
                item, error = items.get(
                    timeout=None if wait is None else min(wait, threading.TIMEOUT_MAX)
                )
            except queue.Empty:
                yield None
                continue
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()

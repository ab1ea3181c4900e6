"""Pictures that many clients send, in the batches that one detector takes."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmdet.structures import DetDataSample

from ..apis import DynamicInferencer
from ..apis.stream import Stream
from ..errors import UsageError
from ..models.budget_control import preserved_budget
from ..routing.queue_controller import QueueController, Waiting
from .metrics import Metrics


class Busy(Exception):
    """More waits than can be answered in time."""


class Stopping(Exception):
    """No picture is accepted any more."""


@dataclass
class _Job:
    """A picture on its way to its answer."""

    image: Tensor
    sample: DetDataSample
    arrived: float
    answer: Future = field(default_factory=Future)

    @property
    def shape(self) -> tuple:
        return tuple(self.image.shape)


class Batcher:
    """A detector and the thread that owns it. First passes take what waits, as many pictures of one
    shape as came meanwhile, and nobody waits for a batch to fill while the detector idles; hard
    pictures wait, as feature maps, until later passes are full, due, or there is nothing else to
    do.

    Others in a batch change a result by rounding alone: only pictures of one shape share it.

    Args:
        detector (DynamicInferencer): Its speed is as set, or the controller's.
        target (float, optional): Seconds from arrival to answer: the controller raises the
            threshold as the queue grows, and refuses only what even the first exit could not
            answer in time. Defaults to None: the detector's own threshold.
        most_share (float): With a target, the hard share of an idle server. Defaults to 1.
        batch_size (int): Most pictures of a pass. Defaults to 8.
        queue (int): Most pictures that may be here. Defaults to 256.
        metrics (Metrics, optional): Told of passes.

    Raises:
        UsageError: If the target is out of reach, or regions are looked at again.
    """

    def __init__(
        self,
        detector: DynamicInferencer,
        target: float | None = None,
        most_share: float = 1.0,
        batch_size: int = 8,
        queue: int = 256,
        metrics: Metrics | None = None,
    ) -> None:
        model = detector.model
        if getattr(model, 'regions', None) is not None and target is not None:
            raise UsageError(
                'a target latency is for whole pictures, and this detector looks at regions again: '
                'give --threshold'
            )
        self.detector, self.batch_size, self.most_waiting = detector, batch_size, queue
        self.metrics = metrics or Metrics()
        self._jobs: deque[_Job] = deque()
        self._flying: dict[int, _Job] = {}
        #: Accepted and not answered; of all so far; when the oldest of the first pass came.
        self._entered, self._number, self._oldest = 0, 0, 0.0
        self.metrics.watch(lambda: self._entered)
        self._changed, self._stopping = threading.Condition(), False
        self.controller = None
        #: Of an idle server, an image of each exit: seconds.
        self.costs = self._warm_up()
        if target is not None:
            self.controller = QueueController(
                target,
                self._waiting,
                self.costs,
                model.difficulties.tolist(),
                model.num_exits,
                most_share,
            )
        self._stream = Stream(
            model,
            batch_size,
            deadline=0.1 if target is None else target / 2,
            controller=self.controller,
            in_order=False,
            on_pass=self._on_pass,
        )
        self._thread = threading.Thread(target=self._work, name='detector', daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the detector is at work, or waits for some."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether a picture would be accepted."""
        return self.alive and not self._stopping and not self._is_full()

    @contextlib.contextmanager
    def accepted(self):
        """Around all that is done for a picture, to its answer: it counts as one that waits.

        Raises:
            Busy: If it could not be answered in time.
            Stopping: After `stop`.
        """
        with self._changed:
            if self._stopping:
                raise Stopping
            if self._is_full():
                raise Busy
            self._entered += 1
        try:
            yield
        finally:
            with self._changed:
                self._entered -= 1
                self._changed.notify()

    def detect(self, data: dict, arrived: float) -> Future:
        """Queue a picture; inside `accepted`.

        Args:
            data (dict): As `DynamicInferencer.prepare` gives it.
            arrived (float): When it came, by ``time.monotonic``.

        Returns:
            Future: Of its result: ``boxes``, (D, 4), left, top, right, bottom in pixels, ``labels``
                and ``scores``, (D,), ``difficulty`` and ``exit``. Canceled, it is left out.
        """
        job = _Job(data['inputs'], data['data_samples'], arrived)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job.answer

    def stop(self) -> None:
        """Answer all that was accepted, then end. Nothing is accepted any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _is_full(self) -> bool:
        later = self._stream.waiting
        # What is in a pass now must end, too.
        waiting = Waiting(self._entered - later, later, 0.0)
        if self.controller is not None and self.controller.refuses(waiting):
            return True
        return self._entered >= self.most_waiting

    def _waiting(self) -> Waiting:
        """What waits; called in several threads, so a little old at worst."""
        age = time.monotonic() - self._oldest
        # Those that are being decoded will be here next.
        return Waiting(max(self._entered - len(self._flying), 0), self._stream.waiting, age)

    def _warm_up(self, rounds: int = 3) -> tuple[float, float]:
        """Seconds of an image of noise at the first and at the last exit; what comes first, and
        takes longer, is behind us then."""
        noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
        load, *rest = self.detector.pipeline.transforms
        model, costs = self.detector.model, []
        with preserved_budget(model):
            for threshold in (1.0, -1.0):
                model.set_budget(threshold=threshold)
                seconds = []
                for _ in range(rounds):
                    results = load(dict(img=noise))
                    for step in rest:
                        results = step(results)
                    batch = dict(inputs=[results['inputs']], data_samples=[results['data_samples']])
                    with torch.no_grad():
                        start = time.monotonic()
                        model.test_step(batch)
                        seconds.append(time.monotonic() - start)
                costs.append(min(seconds))
        return tuple(costs)

    def _on_pass(self, what: str, seconds: float, images: int) -> None:
        self.metrics.passed(what, seconds, images)
        if self.controller is not None:
            self.controller.passed(what, seconds, images)

    def _most(self, what: str) -> int:
        if self.controller is None:
            return self.batch_size
        return min(self.batch_size, self.controller.most(what))

    def _take(self) -> list[_Job] | None:
        """What the next first pass takes, the oldest and others of its shape; nothing where later
        passes wait alone; None at the end."""
        with self._changed:
            while True:
                while self._jobs and not self._jobs[0].answer.set_running_or_notify_cancel():
                    self._jobs.popleft()
                if self._jobs:
                    break
                if self._flying:
                    return []
                if self._stopping and not self._entered:
                    return None
                self._changed.wait()
            taken, left = [self._jobs.popleft()], deque()
            most = self._most('first')
            while self._jobs and len(taken) < most:
                job = self._jobs.popleft()
                if job.shape != taken[0].shape:
                    left.append(job)
                elif job.answer.set_running_or_notify_cancel():
                    taken.append(job)
            self._jobs.extendleft(reversed(left))
        return taken

    def _work(self) -> None:
        while (jobs := self._take()) is not None:
            try:
                self._advance(jobs)
            except Exception as error:
                # Whatever a detector may raise: who waits must be told, and others served.
                for job in self._flying.values():
                    job.answer.set_exception(error)
                self._flying = {}
                self._stream.__exit__()
            self._show()

    def _advance(self, jobs: Sequence[_Job]) -> None:
        """One pass; two where pictures wait that are due."""
        for job in jobs:
            self._number += 1
            job.sample.set_metainfo(dict(request=self._number))
            self._flying[self._number] = job
        found = []
        self._stream.hard_batch = self._most('later')
        if jobs:
            self._oldest = min(job.arrived for job in jobs)
            found += self._stream.put(
                dict(inputs=[job.image for job in jobs], data_samples=[job.sample for job in jobs])
            )
        if self._stream.arrived or not jobs:
            found += self._stream.step()
        for sample in found:
            self._answer(self._flying.pop(sample.request), sample)

    def _answer(self, job: _Job, sample: DetDataSample) -> None:
        found = sample.pred_instances
        job.answer.set_result(
            dict(
                boxes=found.bboxes.tolist(),
                labels=found.labels.tolist(),
                scores=found.scores.tolist(),
                difficulty=float(sample.difficulty),
                exit=int(sample.exit),
            )
        )
        self.metrics.answered(sample.exit, time.monotonic() - job.arrived)

    def _show(self) -> None:
        waiting = self._waiting()
        share = None if self.controller is None else self.controller.share
        threshold = self.detector.model.threshold.reshape(-1)[0].item()
        if self.controller is not None:
            threshold = np.atleast_1d(self.controller.threshold)[0]
        self.metrics.show(waiting.first, waiting.later, threshold, share)

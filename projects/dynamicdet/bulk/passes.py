"""What is done for some pictures: the first pass, and the later ones of those that are hard.

In one process they follow each other; of two pools of processes each does one. Batches are the same
in both, so results are, bit for bit.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config

from mmdet.structures import DetDataSample

from ..apis import DynamicInferencer
from ..cascade.batch_state import BatchState, join_batch_states
from ..deploy.folder import open_detector
from ..errors import UsageError, reason_of
from ..routing.budget import Budget
from .sources import Picture, read_bytes

#: A row of the table of results, by its columns: see `bulk.table`.
Row = dict[str, Any]


@dataclass
class Hard:
    """Pictures that go on together.

    Attributes:
        places (list[int]): Which of the part they are.
        rows (list[Row]): Their rows, as far as they are known.
        state (BatchState, optional): What the first pass left; None where it is run again.
        pictures (list[Picture]): Where they are.
    """

    places: list[int]
    rows: list[Row]
    state: BatchState | None
    pictures: list[Picture]


class Passes:
    """A detector that takes pictures part by part.

    Args:
        detector (DynamicInferencer): Its budget decides who is hard.
        batch_size (int): Most pictures of a pass. Defaults to 1.
        most_pixels (int): Width times height of the largest picture that is decoded.

    Raises:
        UsageError: If the detector looks at regions again.
    """

    def __init__(
        self, detector: DynamicInferencer, batch_size: int = 1, most_pixels: int = 200_000_000
    ) -> None:
        if getattr(detector.model, 'regions', None) is not None:
            raise UsageError(
                'this detector looks at regions again, which tools/image_demo.py does: detection '
                'in bulk takes whole pictures'
            )
        self.detector, self.model = detector, detector.model
        self.batch_size, self.most_pixels = batch_size, most_pixels

    def rows_of(self, pictures: Sequence[Picture], **read: Any) -> list[Row]:
        """Detect in a part, in this process: a row for each picture, in order."""
        rows, hard = self.first(pictures, **read)
        for batch in hard:
            for place, row in zip(batch.places, self.later(batch)):
                rows[place] = row
        return rows

    def first(
        self,
        pictures: Sequence[Picture],
        prepare: Callable[[Picture], tuple] | None = None,
        hand_over: bool = True,
    ) -> tuple[list[Row | None], Iterator[Hard]]:
        """The first pass.

        Args:
            pictures (Sequence[Picture]): A part.
            prepare (Callable, optional): In the place of `prepare`: whose results may be there
                already.
            hand_over (bool): Whether hard pictures take what the first pass left with them.
                Defaults to True.

        Returns:
            tuple: Rows of easy and unreadable pictures, None in the places of hard ones; and an
                iterator of these, by which the pass is run: rows are there once it has ended.
        """
        rows: list[Row | None] = [None] * len(pictures)
        return rows, self._first(pictures, prepare or self.prepare, rows, hand_over)

    def prepare(self, picture: Picture) -> tuple[dict | None, str | None]:
        """A picture as the detector takes it; or why it cannot be had. May be called in several
        threads."""
        try:
            return self.detector.prepare(read_bytes(picture), self.most_pixels)
        except Exception as error:
            # Those of buckets are of many kinds, and one picture stops nothing.
            return None, f'cannot be read: {getattr(error, "strerror", None) or reason_of(error)}'

    @torch.no_grad()
    def later(self, hard: Hard) -> list[Row]:
        """All later passes of pictures that are hard together: their rows."""
        if hard.state is None:
            return self._from_pictures(hard)
        state = hard.state
        found: dict[int, DetDataSample] = {}
        numbers = {id(sample): place for place, sample in enumerate(state.samples)}
        while True:
            if self.model.merge:
                self.model.detect(state)
            leaving, going_on = state.split()
            if len(leaving):
                places = [numbers[id(sample)] for sample in leaving.samples]
                found.update(zip(places, self.model.finish(leaving)))
            if not len(going_on):
                break
            state = self.model.deepen(going_on)
        return [_row(row, found[place]) for place, row in enumerate(hard.rows)]

    def _from_pictures(self, hard: Hard) -> list[Row]:
        """`later`, from the beginning. What was there a moment ago may be gone."""
        prepared = [self.prepare(picture) for picture in hard.pictures]
        rows = [
            row if fault is None else empty_row(picture, fault)
            for row, picture, (_, fault) in zip(hard.rows, hard.pictures, prepared)
        ]
        there = [place for place, (_, fault) in enumerate(prepared) if fault is None]
        if there:
            state = self._start([prepared[place][0] for place in there])
            found = self.later(Hard(there, [rows[place] for place in there], state, []))
            for place, row in zip(there, found):
                rows[place] = row
        return rows

    def _start(self, prepared: Sequence[dict]) -> BatchState:
        data = self.model.data_preprocessor(
            dict(
                inputs=[one['inputs'] for one in prepared],
                data_samples=[one['data_samples'] for one in prepared],
            ),
            False,
        )
        return self.model.start(data['inputs'], data['data_samples'])

    def _first(
        self, pictures: Sequence[Picture], prepare: Callable, rows: list, hand_over: bool
    ) -> Iterator[Hard]:
        by_shape: dict[tuple, list] = {}
        waiting: dict[tuple, list] = {}
        for place, picture in enumerate(pictures):
            prepared, fault = prepare(picture)
            if fault is not None:
                rows[place] = empty_row(picture, fault)
                continue
            batch = by_shape.setdefault(tuple(prepared['inputs'].shape), [])
            batch.append((place, prepared))
            if len(batch) == self.batch_size:
                yield from self._pass(pictures, batch, rows, waiting, hand_over)
                batch.clear()
        for batch in by_shape.values():
            if batch:
                yield from self._pass(pictures, batch, rows, waiting, hand_over)
        for group in waiting.values():
            if group:
                yield _joined(group, pictures, hand_over)

    @torch.no_grad()
    def _first_state(self, batch: list) -> BatchState:
        state = self._start([prepared for _, prepared in batch])
        if self.model.merge:
            self.model.detect(state)
        return state

    @torch.no_grad()
    def _finished(self, state: BatchState) -> list:
        return self.model.finish(state)

    def _pass(
        self, pictures: Sequence[Picture], batch: list, rows: list, waiting: dict, hand_over: bool
    ) -> Iterator[Hard]:
        """The first pass of a batch: easy ones get their rows, hard ones wait until as many are
        there."""
        state = self._first_state(batch)
        started = []
        for place, prepared in batch:
            height, width = prepared['data_samples'].ori_shape[:2]
            started.append(dict(empty_row(pictures[place]), width=int(width), height=int(height)))
        easy = [row for row, exit in enumerate(state.exits) if exit == state.exit]
        if easy:
            for row, sample in zip(easy, self._finished(state.take(easy))):
                rows[batch[row][0]] = _row(started[row], sample)
        for row in (row for row, exit in enumerate(state.exits) if exit > state.exit):
            single = state.take([row])
            group = waiting.setdefault(single.shapes, [])
            group.append((batch[row][0], started[row], single))
            if len(group) == self.batch_size:
                yield _joined(group, pictures, hand_over)
                group.clear()


def build_passes(
    config: Config | str,
    checkpoint: str | None,
    device: str | None,
    budget: Budget | None,
    batch_size: int,
    most_pixels: int,
) -> Passes:
    """The detector of a process, at a speed; see `open_detector` and `Passes`."""
    detector = open_detector(config, checkpoint, device)
    if budget:
        detector.model.set_budget(budget)
    return Passes(detector, batch_size, most_pixels)


def _joined(group: list, pictures: Sequence[Picture], hand_over: bool) -> Hard:
    places = [place for place, _, _ in group]
    return Hard(
        places,
        [row for _, row, _ in group],
        join_batch_states([state for _, _, state in group]) if hand_over else None,
        [pictures[place] for place in places],
    )


def empty_row(picture: Picture, error: str | None = None) -> Row:
    """The row of a picture of which nothing is known, or why not."""
    return dict(
        picture=picture.name,
        width=None,
        height=None,
        difficulty=None,
        exit=None,
        boxes=[],
        labels=[],
        scores=[],
        error=error,
    )


def _row(row: Row, sample: DetDataSample) -> Row:
    found = sample.pred_instances
    return dict(
        row,
        difficulty=float(sample.difficulty),
        exit=int(sample.exit),
        boxes=found.bboxes.tolist(),
        labels=found.labels.tolist(),
        scores=found.scores.tolist(),
    )


def measure_passes(
    passes: Passes, picture: Picture, rounds: int = 3
) -> tuple[float, float, int] | None:
    """Seconds of the first pass and of the later ones of a picture, at least of some rounds, and
    the bytes that it would take with it; None if it cannot be read."""
    prepared, fault = passes.prepare(picture)
    if fault is not None:
        return None
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        with torch.no_grad():
            state = passes._start([prepared])
        middle = time.perf_counter()
        state.exits[:] = [passes.model.num_exits - 1]
        passes.later(Hard([0], [empty_row(picture)], state, [picture]))
        times.append((middle - start, time.perf_counter() - middle))
    size = sum(maps.numel() * maps.element_size() for maps in state.maps)
    size += 0 if state.images is None else state.images.numel() * state.images.element_size()
    return (*(min(column) for column in zip(*times)), size)

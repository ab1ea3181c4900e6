"""Run a detector over a video, and show what it did: boxes, exits and costs.

Nothing here grows with the number of frames but the files.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from mmdet.apis import DetInferencer

from ..building import build_model
from ..cascade.weights import require_complete
from ..checkpoints import read_checkpoint
from ..errors import UsageError
from ..models import DynamicDetector, fuse
from ..routing.budget import Budget
from ..routing.budget_report import BudgetReport, report_budget
from ..timing import now
from ..transfers import Followed, to_host
from .calibration import GateBudgetController
from .film_detector import FilmDetector
from .gates import name_of
from .overlay import colors_of, draw_frame
from .part_building import build_gate
from .sources import FrameSource, VideoFrame
from .timeline import Timeline, draw_timeline
from .writer import MAX_FPS, VideoWriter


class FrameResult(NamedTuple):
    """What a detector made of a frame.

    Attributes:
        exit (int, optional): Taken; -1: the detections of an earlier frame, or none. None: the
            detector has no exits.
        difficulty (float, optional): In [0, 1].
        gflops (float, optional): What it cost, or the mean cost of that exit, as calibrated; None
            if neither is known.
        seconds (float): From the picture, as the pipeline gives it, to the boxes.
        detections (list[dict]): ``bbox`` [x1, y1, x2, y2] in the picture's pixels, ``label`` and
            ``score``, the surest first.
    """

    exit: int | None
    difficulty: float | None
    gflops: float | None
    seconds: float
    detections: list[dict]


@dataclass
class Summary:
    """What became of a video.

    Attributes:
        frames (int): That were detected in.
        faults (int): That could not be read.
        exits (Counter): Frames by exit; empty for a detector without.
        seconds (float): The detector's, all together.
        gflops (float, optional): Mean per frame, if the detector is calibrated.
        ended (str, optional): Why the source ended before its end.
        stopped (bool): Whether it was interrupted.
        files (list[str]): That were written.
    """

    frames: int = 0
    faults: int = 0
    exits: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    gflops: float | None = None
    ended: str | None = None
    stopped: bool = False
    files: list[str] = field(default_factory=list)

    def above(self, budget: Budget | None) -> list[str]:
        """A sentence where the mean cost of frames, in GFLOPs or by the clock, is above a target by
        a tenth or more."""
        if not self.frames or budget is None or not budget.is_target:
            return []
        mean, scale, unit = dict(
            target_gflops=(self.gflops, 1, 'GFLOPs'),
            target_latency=(self.seconds / self.frames, 1e3, 'ms'),
        )[budget.kind]
        if mean is None or mean <= 1.1 * budget.value:
            return []
        return [
            f'frames cost {scale * mean:.3g} {unit} in the mean, and {scale * budget.value:.3g} '
            'were wanted: calibrate on videos like this one, or hold the target on it (--online)'
        ]


class FrameDetector(DetInferencer):
    """Any detector of MMDetection, frame by frame, through its config's test pipeline.

    Args:
        cfg (Config): With ``model`` and ``test_dataloader``.
        checkpoint (str): Path or URL.
        device (str, optional): Defaults to the best that is there.
        gate (Mapping, optional): Config of a gate in the place of the config's, for an
            `EarlyExitDetector`.
        budget (Budget or Mapping, optional): The wanted speed; see the model's ``set_budget``.
        score (float): Detections below it are left out. Defaults to 0.3.
        online (bool): Whether the budget, ``target_latency`` or ``target_gflops``, is held on the
            frames that come: thresholds then follow what frames really cost, see
                `GateBudgetController`. Defaults to False.

    Raises:
        UsageError: If the model takes no gate or budget, or the checkpoint does not fit.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str,
        device: str | None = None,
        gate: Mapping | None = None,
        budget: Budget | Mapping | None = None,
        score: float = 0.3,
        online: bool = False,
    ) -> None:
        # Not `score < 0 or ...`, which lets NaN pass.
        if not 0 <= score <= 1:
            raise UsageError(f'detections are left out below a score in [0, 1]; got {score}')
        budget = Budget.parse(budget)
        self._gate, self._budget, self.score, self._warm = gate, budget, score, False
        self._costs = Followed(torch.Tensor.tolist)
        if gate:
            if cfg.model.get('type') != 'EarlyExitDetector':
                raise UsageError(
                    'only an EarlyExitDetector takes a gate; the config has a '
                    f'{cfg.model.get("type")}'
                )
            _try_gate(gate)
            cfg.model.gate = dict(gate)
        super().__init__(cfg, checkpoint, device, show_progress=False)
        if budget:
            if not hasattr(self.model, 'set_budget'):
                raise UsageError(
                    f'a {type(self.model).__name__} has one speed only: leave out the budget'
                )
            self.model.set_budget(budget)
        self._online = _gate_controller(self.model, budget) if online else None
        self.exits = int(getattr(self.model, 'num_exits', 0))
        self.classes = list(self.model.dataset_meta['classes'])
        self.colors = colors_of(self.classes, self.model.dataset_meta.get('palette'))

    def _init_model(self, cfg: Config, weights: str, device: str = 'cpu') -> nn.Module:
        """As mmengine's, but a model that cannot be built is said in one line."""
        checkpoint = read_checkpoint(weights)
        model = build_model(cfg)
        model.cfg = cfg
        self._load_weights_to_model(model, checkpoint, cfg)
        return model.to(device).eval()

    def _load_weights_to_model(self, model: nn.Module, checkpoint: dict | None, cfg: dict) -> None:
        """As mmdet's, but refuse a checkpoint that leaves parts of the model random, and thresholds
        of another gate."""
        state = checkpoint.get('state_dict', checkpoint)
        if self._gate and not any(True for _ in model.gate.state_dict()):
            # Those of a gate that learned and is replaced by one that does not.
            state = {key: value for key, value in state.items() if not key.startswith('gate.')}
            checkpoint = dict(checkpoint, state_dict=state)
        require_complete(model, state, ('operating_points',))
        calibrated = checkpoint.get('meta', {}).get('calibration', {}).get('gate')
        gate_name = name_of(getattr(model, 'gate', None))
        by_threshold = self._budget is not None and self._budget.kind == 'threshold'
        if calibrated not in (None, gate_name) and not by_threshold:
            raise UsageError(
                f"the checkpoint's thresholds are of {calibrated}, and the detector has "
                f'{gate_name}: give --gate as it was calibrated, calibrate it with this one, or '
                'give --budget threshold=...'
            )
        super()._load_weights_to_model(model, checkpoint, cfg)
        fuse(model)

    @torch.no_grad()
    def detect(self, picture: np.ndarray, stream: object, number: int) -> FrameResult:
        """Detect in a frame. The first one of all is run twice: what a first run takes is no cost
        of a frame.

        Args:
            picture (ndarray): (H, W, 3) uint8, BGR.
            stream (Hashable): The stream that it belongs to.
            number (int): Its place in the stream: 0 begins it.
        """
        if not self._warm:
            self._warm = True
            self.detect(picture, stream, number)
            self.forget(stream)
        meta = dict(video_id=stream, frame_id=number)
        data = self.pipeline(dict(img=picture, img_id=number, **meta))
        # Whatever the pipeline keeps.
        data['data_samples'].set_metainfo(meta)
        device = next(self.model.parameters()).device
        start = now(device)
        (sample,) = self.model.test_step(
            dict(inputs=[data['inputs']], data_samples=[data['data_samples']])
        )
        seconds = now(device) - start
        exit, difficulty = sample.get('exit'), sample.get('difficulty')
        # Where it depends on the frame, the sample says what it cost.
        gflops = sample.get('gflops', self._gflops(exit))
        if self._online is not None:
            timed = self._budget.kind == 'target_latency'
            self._online.measure(seconds if timed else gflops)
            self.model.set_budget(threshold=self._online.thresholds)
        return FrameResult(
            None if exit is None else int(exit),
            None if difficulty is None else float(difficulty),
            gflops,
            seconds,
            _detections(sample.pred_instances, self.score),
        )

    def forget(self, stream: object) -> None:
        """Let a detector that remembers streams forget one."""
        if hasattr(self.model, 'reset'):
            self.model.reset(stream)

    def budget_report(self, summary: Summary) -> BudgetReport | None:
        """What a `DynamicDetector` served of its budget; None of other detectors, and of films,
        whose budget is a price."""
        model = self.model
        if not isinstance(model, DynamicDetector) or isinstance(model, FilmDetector):
            return None
        return report_budget(
            [summary.exits[exit] for exit in range(model.num_exits)],
            model.budget,
            model.threshold.reshape(-1).tolist(),
            model.difficulties.tolist(),
            model.latencies.tolist(),
            model.gflops.tolist(),
            summary.seconds / summary.frames if summary.frames else None,
        )

    def _gflops(self, exit: int | None) -> float | None:
        costs = getattr(self.model, 'gflops', None)
        if exit is None or costs is None:
            return None
        # An early-exit detector's begin with exit -1.
        cost = self._costs(costs)[exit + len(costs) - self.exits]
        return None if math.isnan(cost) else cost


def _try_gate(gate: Mapping) -> None:
    """Raise a `UsageError` if a gate cannot be built."""
    try:
        build_gate(dict(gate), [1], 1)
    except Exception as error:
        # Its constructor may raise anything.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f'{dict(gate)} is no gate: {reason}') from None


def _gate_controller(model: nn.Module, budget: Budget | None) -> GateBudgetController:
    if budget is None or not budget.is_target or not hasattr(model, 'operating_points'):
        raise UsageError(
            'online holds target_latency or target_gflops, of a calibrated EarlyExitDetector'
        )
    return GateBudgetController.of_points(model.operating_points, budget)


def _detections(instances, score: float) -> list[dict]:
    ((boxes, scores, labels),) = to_host([instances])
    order = scores.argsort(descending=True)
    order = order[scores[order] >= score]
    rows = zip(*(values[order].tolist() for values in (boxes, labels, scores)))
    return [
        dict(bbox=[round(edge, 2) for edge in box], label=label, score=round(value, 4))
        for box, label, value in rows
    ]


class Lines:
    """A file of JSON lines, in a ``with`` block. Each line is on the disk when the next one is
    written; the file has its name when the block ends, also by an error. A kill leaves
    ``.NAME.part``. Two runs cannot write one file at the same time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._part = self.path.with_name(f'.{self.path.name}.part')
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Not 'w': what another run writes now must not be cut.
            self._file = open(self._part, 'a', encoding='utf-8', buffering=1)
            _claim(self._file)
        except BlockingIOError:
            self._file.close()
            raise UsageError(
                f"'{path}' is being written by another run: name another file"
            ) from None
        except OSError as error:
            raise UsageError(f"'{path}' cannot be written: {error.strerror}") from error
        self._file.truncate(0)

    def __enter__(self) -> 'Lines':
        return self

    def __exit__(self, *_) -> None:
        # Named before it is let go: another run then begins a file of its own.
        self._file.flush()
        os.replace(self._part, self.path)
        self._file.close()

    def write(self, entry: dict) -> None:
        """Append an entry as one line of JSON."""
        self._file.write(json.dumps(entry) + '\n')


def _claim(file: TextIO) -> None:
    """Lock a file until it is closed, or raise a `BlockingIOError` if another process has."""
    import fcntl  # here, because it is POSIX only, and importing the package is not

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def run_demo(
    detector: FrameDetector,
    source: FrameSource,
    out: str | Path,
    most: int | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[int], None] | None = None,
) -> Summary:
    """Detect in the frames of a source, one after the other.

    Writes the drawn video ``out`` (H.264), a JSON line per frame beside it (``.jsonl``), and a
    picture of exits and costs over time (``.png``). All have what was done until then when the run
    is interrupted or fails. The video shows each frame at the time of its line. A frame that cannot
    be read is said, takes its place in the lines and, as the frame before once more, in the video;
    what the detector remembers of the stream stays.

    Args:
        detector (FrameDetector): Detects.
        source (FrameSource): Of the frames; it is closed at the end.
        out (str or Path): Video to write, .mp4.
        most (int, optional): Stop after so many frames.
        say (Callable): Told what is odd, a line each, the first 20 of a kind at most.
        progress (Callable, optional): Called with the number of frames that are done, after each.

    Raises:
        UsageError: If ``out`` does not end in .mp4 or cannot be written.
    """
    require_film(out)
    out = Path(out)
    files = [out, out.with_suffix('.jsonl'), out.with_suffix('.png')]
    detector.forget(source.name)
    fps = min(source.fps, MAX_FPS)
    if fps < source.fps:
        say(f'the source has {source.fps:g} frames per second: they are shown at {fps}')
    for note in source.notes:
        say(note)
    # The writer first: one that cannot begin must leave no file of lines.
    with source, VideoWriter(files[0], fps, fragmented=True) as writer, Lines(files[1]) as lines:
        show = _Show(detector, writer, lines, _Limited(say), source.fps / fps)
        try:
            for frame in source:
                show.take(frame, source.name)
                if progress is not None:
                    progress(frame.number + 1)
                if most is not None and frame.number + 1 >= most:
                    break
        except KeyboardInterrupt:
            show.summary.stopped = True
        finally:
            draw_timeline(show.timeline, files[2], detector.exits)
    show.summary.ended = source.ended
    show.summary.files = [str(file) for file in files if file.exists()]
    return show.summary


def require_film(path: str | Path) -> None:
    """Raise a `UsageError` unless a file's name is one that `run_demo` writes."""
    if Path(path).suffix.lower() != '.mp4':
        raise UsageError(f"the video to write must end in .mp4, got '{path}'")


class _Limited:
    """Passes on the first lines of each kind, and says when it does not any more."""

    def __init__(self, say: Callable[[str], None], most: int = 20) -> None:
        self._say, self._most, self._counts = say, most, Counter()

    def __call__(self, kind: str, line: str) -> None:
        self._counts[kind] += 1
        if self._counts[kind] <= self._most:
            self._say(line)
        if self._counts[kind] == self._most:
            self._say(f'(more of this kind are only in the file of lines: {kind})')


@dataclass
class _Show:
    """Takes frames, one by one, to the detector and into the files."""

    detector: FrameDetector
    writer: VideoWriter
    lines: Lines
    say: _Limited
    slower: float = 1.0  # the film than the source
    timeline: Timeline = field(default_factory=Timeline)
    summary: Summary = field(default_factory=Summary)
    _size: tuple | None = None
    _drawn: np.ndarray | None = None
    _gflops: float = 0.0

    def take(self, frame: VideoFrame, stream: str) -> None:
        entry = dict(frame=frame.number, time=round(frame.time, 4))
        if frame.picture is None:
            self._skip(frame, entry)
            return
        size = frame.picture.shape[1::-1]
        if self._size not in (None, size):
            entry['size_before'] = self._size
            self.say('size', f'frame {frame.number}: the size changes from {self._size} to {size}')
        self._size = size
        result = self.detector.detect(frame.picture, stream, frame.number)
        self._count(frame, result)
        self.lines.write(
            dict(
                entry,
                size=size,
                exit=result.exit,
                difficulty=_round(result.difficulty),
                gflops=_round(result.gflops),
                seconds=_round(result.seconds),
                detections=result.detections,
            )
        )
        depth = None if result.exit is None else (result.exit + 1) / self.detector.exits
        self._drawn = draw_frame(
            frame.picture,
            result.detections,
            self.detector.classes,
            self.detector.colors,
            self._text(frame, result),
            depth,
        )
        self._film(frame)

    def _film(self, frame: VideoFrame) -> None:
        """Show what was drawn last at a frame's time."""
        self.writer.write(self._drawn, self.slower * frame.time, frame.duration)

    def _skip(self, frame: VideoFrame, entry: dict) -> None:
        self.summary.faults += 1
        self.say('fault', f'frame {frame.number}: {frame.fault}')
        self.timeline.add_fault(frame.time)
        self.lines.write(dict(entry, fault=frame.fault))
        if self._drawn is not None:
            self._film(frame)

    def _count(self, frame: VideoFrame, result: FrameResult) -> None:
        summary = self.summary
        summary.frames += 1
        summary.seconds += result.seconds
        if result.exit is not None:
            summary.exits[result.exit] += 1
        if result.gflops is not None:
            self._gflops += result.gflops
            summary.gflops = self._gflops / summary.frames
        self.timeline.add(frame.time, result.exit, result.seconds, result.gflops)

    def _text(self, frame: VideoFrame, result: FrameResult) -> list[str]:
        first = f'frame {frame.number}  {frame.time:.2f} s'
        if result.exit is not None:
            taken = (
                f'{result.exit} of {self.detector.exits - 1}'
                if result.exit >= 0
                else '-1, boxes as before'
                if result.detections
                else '-1, nothing there'
            )
            first += f'  exit {taken}  difficulty {result.difficulty:.2f}'
        mean = self.summary.seconds / self.summary.frames
        second = f'{1e3 * result.seconds:.1f} ms, mean {1e3 * mean:.1f}'
        if result.gflops is not None:
            second += f'  {result.gflops:.3g} GFLOPs, mean {self.summary.gflops:.3g}'
        return [first, second]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 6)

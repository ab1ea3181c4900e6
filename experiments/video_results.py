"""What a run of the experiment on early exit in video came to: from records, and from the clock, to
numbers."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from dynamicdet import cli
from dynamicdet.building import build_loader
from dynamicdet.measuring.calibration import coco_results, provenance
from dynamicdet.routing.evaluation import evaluate
from dynamicdet.video.gate_analysis import RULES, analyze_gates, fitted_gates, load_truth
from dynamicdet.video.gate_simulation import GateRun, Replays, frames_by_video
from dynamicdet.video.gates import Gate
from dynamicdet.video.recording import (
    forced_exit,
    gate_of_checkpoint,
    load_early_exit_detector,
    temporary_gate,
)
from mmdet.registry import MODELS

#: Bootstrap resamples of whole videos, since frames of one are alike; seed 0, the same for all
#: runs.
RESAMPLES = 100
#: Joules per second of a busy core: an assumption, for machines that do not say what they use.
WATTS_PER_CORE = 10.0
RAPL = Path('/sys/class/powercap/intel-rapl:0/energy_uj')
#: A gate is run by the clock at the setting that loses at most so much AP on validation videos.
DROP = 1.0


def head_results(test: Mapping) -> dict:
    """AP of each exit, with resamples, and what it costs."""
    replays, exits = Replays(test, load_truth(test)), len(test['gflops'])
    source = np.arange(len(test['images']))
    weights = resampled_videos(test)
    results = []
    for exit in range(exits):
        run = GateRun(
            np.full(len(source), exit), source, np.zeros(len(source)), np.zeros(len(source))
        )
        results.append(
            dict(
                ap=replays.ap(run),
                gflops=test['gflops'][exit],
                latency=test['latencies'][exit],
                resampled=[round(replays.ap(run, resample), 3) for resample in weights],
            )
        )
    return dict(exits=results, costs=test['costs'], provenance=test['provenance'])


def resampled_videos(record: Mapping) -> np.ndarray:
    """How often each frame counts on each resample, (B, n)."""
    videos, generator = frames_by_video(record), np.random.default_rng(0)
    weights = np.zeros((RESAMPLES, len(record['images'])), int)
    for counts in weights:
        for video, times in zip(
            videos,
            np.bincount(generator.integers(len(videos), size=len(videos)), minlength=len(videos)),
        ):
            counts[video] = times
    return weights


def halves(record: Mapping) -> list[dict]:
    """Two records: of every second video, and of the others. Gates are fitted to one, and set on
    the other."""
    videos = sorted({image['video'] for image in record['images']})
    return [
        dict(
            record,
            images=[image for image in record['images'] if image['video'] in videos[part::2]],
        )
        for part in (0, 1)
    ]


def gates_of(val: Mapping, config: str, checkpoint: str) -> dict[str, Gate]:
    """All gates: by rule, fitted to a part of the validation videos, and the config's own."""
    fit, _ = halves(val)
    gates = {name: MODELS.build(rule) for name, rule in RULES.items()}
    gates.update(fitted_gates(fit, load_truth(val)))
    cfg = Config.fromfile(config)
    if cfg.model.get('gate'):
        gates["the config's"] = gate_of_checkpoint(cfg, checkpoint)
    return gates


def gate_results(test: Mapping, val: Mapping, config: str, checkpoint: str) -> dict:
    """Curves of all gates, of the oracle and of fixed exits; settings are chosen on the other
    validation videos."""
    gates, chosen_on = gates_of(val, config, checkpoint), (halves(val)[1], load_truth(val))
    analysis = analyze_gates(test, load_truth(test), gates, chosen_on, 'latency')
    return {name: analysis[name] for name in ('fixed', 'gates', 'oracles')}


# By the clock.


@torch.no_grad()
def clock_results(
    config: str, checkpoint: str, numbers: Mapping, val: Mapping, threads: int
) -> dict:
    """Run the test videos frame by frame, batch 1, by each gate at its setting and by each exit
    alone; videos in turn, so that what else the machine does meets all alike."""
    before, own_threads = os.getloadavg()[0], torch.get_num_threads()
    cfg = Config.fromfile(config)
    cli.prepare()
    model, _ = load_early_exit_detector(cfg, checkpoint)
    gates = gates_of(val, config, checkpoint)
    ways = {
        f'exit {exit}': lambda exit=exit: forced_exit(model, exit)
        for exit in range(model.num_exits)
    }
    for name, result in numbers['gates'].items():
        if result['within']:
            gate, thresholds = gates[name].eval(), result['within']['thresholds']
            ways[name] = lambda gate=gate, thresholds=thresholds: temporary_gate(
                model, gate, thresholds
            )
    dataset = build_loader(cfg.test_dataloader).dataset
    clocks = {name: Clock() for name in ways}
    torch.set_num_threads(threads)
    for turn, frames in enumerate(cli.progress(list(videos_of(dataset)), 'videos by the clock')):
        batches = [pseudo_collate([dataset[index]]) for index in frames]
        for name, way in ways.items():
            with way():
                if not turn:  # once for the caches
                    run_video(model, batches[:10], dataset.cat_ids, Clock())
                    model.reset()
                run_video(model, batches, dataset.cat_ids, clocks[name])
    torch.set_num_threads(own_threads)
    coco = load_truth(dict(images=[], provenance={}), dataset.ann_file)
    ids = [dataset.get_data_info(index)['img_id'] for index in range(len(dataset))]
    return dict(
        threads=threads,
        frames=len(ids),
        load_before=before,
        load_after=os.getloadavg()[0],
        provenance=provenance(cfg, checkpoint, dataset, 'cpu'),
        energy='RAPL' if energy() is not None else f'estimated: {WATTS_PER_CORE:g} W per busy core',
        ways={
            name: clock.sums(evaluate(coco, clock.results, ids)['ap'])
            for name, clock in clocks.items()
        },
    )


def videos_of(dataset) -> Iterator[list[int]]:
    """Numbers of the frames of each video, in order."""
    by_video: dict[int, list] = {}
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        by_video.setdefault(info['video_id'], []).append((info['frame_id'], index))
    for frames in by_video.values():
        yield [index for _, index in sorted(frames)]


class Clock:
    """What one way of exiting took, and found."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu = 0.0
        self.joules = 0.0
        self.exits: list[int] = []
        self.results: list[dict] = []

    def sums(self, ap: float | None) -> dict:
        frames = len(self.seconds)
        joules = self.joules if energy() is not None else self.cpu * WATTS_PER_CORE
        exits = np.array(self.exits)
        by_exit = {
            str(exit): float(np.mean(np.array(self.seconds)[exits == exit]))
            for exit in np.unique(exits)
        }
        return dict(
            by_exit=by_exit,
            ap=ap,
            seconds=sum(self.seconds) / frames,
            median=float(np.median(self.seconds)),
            joules_per_1000=1000 * joules / frames,
            exits=np.bincount(np.array(self.exits) + 1).tolist(),
        )


def run_video(model, batches: Sequence[dict], category_ids: Sequence[int], clock: Clock) -> None:
    """One video, frame after frame."""
    for batch in batches:
        before, cpu, start = energy(), time.process_time(), time.perf_counter()
        (sample,) = model.test_step(batch)
        clock.seconds.append(time.perf_counter() - start)
        clock.cpu += time.process_time() - cpu
        clock.joules += joules_since(before) if before is not None else 0
        clock.exits.append(int(sample.exit))
        clock.results += [
            dict(detection, image_id=sample.img_id)
            for detection in coco_results(sample, category_ids)
        ]


def joules_since(before: float) -> float:
    """The counter begins anew at its largest value."""
    used = energy() - before
    return (
        used if used >= 0 else used + int((RAPL.parent / 'max_energy_range_uj').read_text()) / 1e6
    )


def energy() -> float | None:
    """Joules that the processor has used so far; None where it does not say."""
    try:
        return int(RAPL.read_text()) / 1e6
    except OSError:
        return None

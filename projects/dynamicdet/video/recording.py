"""One pass of an early-exit detector over videos, every frame through every exit: a record. See
`record`."""

import contextlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from torch.utils.data import DataLoader

from mmdet.structures import DetDataSample

from ..building import build_model, load_detector
from ..cascade.weights import is_plain, require_complete
from ..checkpoints import read_checkpoint
from ..errors import UsageError
from ..measuring.calibration import coco_results, inference_settings, provenance
from ..models import fuse
from ..progress import Progress
from ..timing import time_call
from .costs import exit_gflops
from .early_exit_detector import EarlyExitDetector
from .gates import FixedExit, Gate, TemporalGate
from .part_building import build_gate
from .streams import as_frames

#: Above all difficulties, and below all.
_ALL_LEAVE, _NONE_LEAVES = 1.0, -1.0


def load_early_exit_detector(
    cfg: Config, path: str, device: str = 'cpu', fused: bool = True
) -> tuple[EarlyExitDetector, dict]:
    """Build an early-exit detector and fill it from its own checkpoint. A gate may be missing
    there: it is then as it is built.

    Args:
        cfg (Config): Its config.
        path (str): Its checkpoint.
        device (str): Where to. Defaults to the CPU.
        fused (bool): Whether to fuse it for inference, see `models.fuse`. Defaults to True.

    Returns:
        tuple: The model, in eval mode, and the checkpoint.

    Raises:
        UsageError: If the config is of another detector or the checkpoint does not fit.
    """
    if cfg.model.type != 'EarlyExitDetector':
        raise UsageError(f"the config's model must be an EarlyExitDetector, not {cfg.model.type}")
    checkpoint = read_checkpoint(path)
    state = {key.removeprefix('module.'): value for key, value in checkpoint['state_dict'].items()}
    if is_plain(state) and not any(key.startswith('heads.') for key in state):
        raise UsageError(f"'{path}' is a plain detector's: train the heads first")
    init_default_scope('mmdet')
    # Another gate than that of the checkpoint may be asked for.
    gate_keys = {key for key in build_model(cfg).state_dict() if key.startswith('gate.')}
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith('gate.') or key in gate_keys
    }
    model, checkpoint = load_detector(cfg, dict(checkpoint, state_dict=state), device, ('gate.',))
    model.cfg = cfg
    return fuse(model) if fused else model, checkpoint


def gate_of_checkpoint(cfg: Config, path: str) -> Gate:
    """The gate of a config, as it was trained, without its detector.

    Raises:
        UsageError: If the config has none or the checkpoint none that fits.
    """
    if not cfg.model.get('gate'):
        raise UsageError(f"the model of '{cfg.filename}' has no gate")
    state = {
        key.removeprefix('module.'): value
        for key, value in read_checkpoint(path)['state_dict'].items()
    }
    gate_state = {
        key.removeprefix('gate.'): value for key, value in state.items() if key.startswith('gate.')
    }
    # One number for each head, in order.
    channels = [
        value.shape[1]
        for key, value in gate_state.items()
        if re.search(r'project\.\d+\.weight$', key)
    ]
    moments = gate_state.get('nothing.mean')
    if cfg.model.gate.get('nothing') and moments is None:
        raise UsageError(
            f"'{path}' has no trained Presence: fit it by tools/calibrate_video.py --fit-record"
        )
    gate = build_gate(cfg.model.gate, channels, 0 if moments is None else len(moments) // 2)
    require_complete(gate, gate_state)
    gate.load_state_dict(gate_state)
    return gate.eval()


def record_videos(
    model: EarlyExitDetector,
    cfg: Config,
    loader: DataLoader,
    progress: Progress,
    checkpoint: str = '',
    frames: int = 20,
    rounds: int = 3,
) -> dict:
    """Run every frame of some videos through every exit, and measure what each exit costs.

    Args:
        model (EarlyExitDetector): In eval mode, on the device whose latencies count. Its gate and
            budget stay.
        cfg (Config): Its config, for the provenance.
        loader (DataLoader): Over frames in order, ``video_id`` and ``frame_id`` in their metainfo.
        progress (Callable): Wraps what is iterated over.
        checkpoint (str): Path of the model's checkpoint, for the provenance.
        frames (int): The first so many are timed, one by one. Defaults to 20.
        rounds (int): How often, after one untimed round. Defaults to 3.

    Returns:
        dict: See `record`.

    Raises:
        UsageError: If the frames do not say where they belong.
    """
    model.reset()
    images = []
    for batch in progress(loader, 'every exit'):
        images.extend(_record_batch(model, batch, loader.dataset.cat_ids))
    gflops, lean = _gflops(model, loader.dataset), {}
    seconds = measure_exit_latencies(model, loader.dataset, progress, frames, rounds)
    for kind, measured in (('gflops', gflops), ('latencies', seconds)):
        lean[kind] = list(measured['alone'])
    costs = {
        kind: dict(early=measured['early'], looked=list(measured['looked']))
        for kind, measured in (('gflops', gflops), ('latencies', seconds))
    }
    facts = dict(
        provenance(cfg, checkpoint, loader.dataset, str(model.thresholds.device)),
        **inference_settings(model, loader),
        cut=model.cut,
        merge=str(model.merge) if model.merge else None,
    )
    return dict(
        images=images,
        gflops=lean['gflops'],
        latencies=lean['latencies'],
        costs=costs,
        provenance={name: value for name, value in facts.items() if value is not None},
    )


@torch.no_grad()
def _record_batch(model: EarlyExitDetector, batch: dict, category_ids: Sequence[int]) -> list[dict]:
    """Entries of a batch's frames."""
    data = model.data_preprocessor(batch, False)
    inputs, samples = as_frames(data['inputs'], data['data_samples'])
    for sample in samples:
        missing = [
            name for name in ('video_id', 'frame_id', 'img_id') if name not in sample.metainfo
        ]
        if missing:
            raise UsageError(
                f'frames do not say their {", ".join(missing)}: name them in the meta_keys of the '
                "pipeline's PackDetInputs"
            )
    outputs = model.predict_all(inputs, samples)
    change, early = outputs.change.tolist(), outputs.early.cpu().numpy()
    pooled = [features.cpu().numpy() for features in outputs.pooled]
    return [
        dict(
            id=int(sample.img_id),
            file=str(sample.img_path),
            video=int(sample.video_id),
            frame=int(sample.frame_id),
            change=change[row],
            early=early[row].copy(),
            pooled=[features[row].copy() for features in pooled],
            detections=[
                coco_results(DetDataSample(pred_instances=instances[row]), category_ids)
                for instances in outputs.detections
            ],
        )
        for row, sample in enumerate(samples)
    ]


@contextlib.contextmanager
def temporary_gate(
    model: EarlyExitDetector, gate: Gate | None, thresholds: Sequence[float]
) -> Iterator[None]:
    """Let a detector run with another gate and other thresholds, and give it its own back. Streams
    are forgotten before and after."""
    gate_before, budget, waits = model.gate, model.budget, model._budget_waits
    thresholds_before = model.thresholds.clone()
    try:
        model.gate = gate
        model.set_budget(threshold=list(thresholds))
        model.reset()
        yield
    finally:
        model.gate, model.budget, model._budget_waits = gate_before, budget, waits
        model.thresholds.copy_(thresholds_before)
        model.reset()


def forced_exit(
    model: EarlyExitDetector, exit: int, looks: bool = False
) -> contextlib.AbstractContextManager:
    """While this is open, every frame leaves at one exit, -1 to E - 1.

    Args:
        model (EarlyExitDetector): The model.
        exit (int): The exit.
        looks (bool): Whether all heads on the way are run. Defaults to False.
    """
    if exit < 0:
        return temporary_gate(model, TemporalGate(), [_ALL_LEAVE] * model.num_exits)
    gate = None if exit == model.num_exits - 1 and not looks else FixedExit(exit, looks)
    return temporary_gate(model, gate, [_NONE_LEAVES] + [0.5] * (model.num_exits - 1))


def _gflops(model: EarlyExitDetector, dataset, frames: int = 10) -> dict[str, object]:
    """Mean GFLOPs of a frame by exit: ``early``, before the first; ``alone``, no other head is run;
    ``looked``, all heads on the way are."""
    rows = np.linspace(0, len(dataset) - 1, min(frames, len(dataset))).round().astype(int)
    shapes = [
        tuple(
            model.data_preprocessor(pseudo_collate([dataset[int(row)]]), False)['inputs'].shape[-2:]
        )
        for row in rows
    ]
    means = {}
    for name, looks in (('alone', False), ('looked', True)):
        with forced_exit(model, model.num_exits - 1, looks):
            by_shape = {shape: exit_gflops(model, shape) for shape in set(shapes)}
        means[name] = np.mean([by_shape[shape] for shape in shapes], axis=0).tolist()
    return dict(early=means['alone'][0], alone=means['alone'][1:], looked=means['looked'][1:])


@torch.no_grad()
def measure_exit_latencies(
    model: EarlyExitDetector, dataset, progress: Progress, frames: int = 20, rounds: int = 3
) -> dict[str, object]:
    """Median seconds of a frame by exit, as `_gflops` names them: frames in order, batch 1, data in
    memory, exits taking turns."""
    batches = [pseudo_collate([dataset[row]]) for row in range(min(frames, len(dataset)))]
    exits = range(model.num_exits)
    # With one head looking or not is the same.
    forced = [
        (-1, False),
        *((exit, False) for exit in exits),
        *((exit, True) for exit in exits if exit),
    ]
    times: dict[tuple, list[float]] = {arguments: [] for arguments in forced}
    device = model.thresholds.device
    for turn in progress(range(rounds + 1), 'latencies'):
        for arguments in forced:
            with forced_exit(model, *arguments):
                for batch in batches:
                    seconds, _ = time_call(lambda: model.test_step(batch), device)
                    if turn:
                        times[arguments].append(seconds)
    medians = {arguments: float(np.median(exit_times)) for arguments, exit_times in times.items()}
    return dict(
        early=medians[-1, False],
        alone=[medians[exit, False] for exit in exits],
        looked=[medians[exit, exit > 0] for exit in exits],
    )

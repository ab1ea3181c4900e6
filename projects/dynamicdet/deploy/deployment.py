"""From a trained detector to a deployment folder."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmdet.models.detectors import BaseDetector

from ..building import load_detector, whole_model
from ..cascade.parts import DetectorPart, Form
from ..compression.quantization import trace_quantization
from ..errors import UsageError
from ..measuring.calibration import measure_difficulties, provenance
from ..measuring.latencies import force_dynamic_exit
from ..models import DynamicDetector
from ..models.budget_control import calibrated_otherwise, preserved_budget
from ..models.detector_parts import find_parts
from ..progress import Progress
from ..routing.thresholds import quantile_map
from .folder import require_new, write_folder
from .graphs import Exported, Graph, export_parts, need_for_deployment, release_weights
from .int8 import (
    BETWEEN,
    PLAIN_BETWEEN,
    Observer,
    Recipe,
    choose_float,
    expose_layer_tensors,
    multiply_adds,
    needs_reduced_range,
    prediction_layers,
    quantize_graph,
    spared_layers,
    trained_ranges,
)
from .latencies import measure_latency, measure_region_seconds, put_latencies, timing_conditions
from .roi_align import place_roi_aligns
from .standalone_parts import halved

#: Batches on which layers are tried in 8 bits.
_TRIED = 16
#: Images that are timed at each exit, and how often.
_TIMED, _ROUNDS = 10, 3


@dataclass(frozen=True)
class Graphed:
    """A detector that graphs of its parts compute.

    Attributes:
        model (BaseDetector): On the CPU, its calibration kept.
        parts (Sequence[DetectorPart]): Of it.
        contents (dict[str, bytes]): The ONNX file of each part, by name.
        forms (dict): How each part's outputs are nested.
        about (dict): What was done, for a manifest.
    """

    model: BaseDetector
    parts: Sequence[DetectorPart]
    contents: dict[str, bytes]
    forms: dict[str, Form]
    about: dict[str, Any]


def deploy(
    cfg: Config,
    path: str,
    out: str,
    loader: DataLoader | None = None,
    progress: Progress = lambda steps, what: steps,
    images: int = 200,
    method: str = 'mse',
    noise: float = 0.01,
    share: float = 0.1,
    reduced: bool | None = None,
    compress: bool = False,
    between: bool = True,
    timed: Dataset | None = None,
) -> dict[str, Any]:
    """Write a detector as a deployment folder.

    Args:
        cfg, path, loader, progress, images, method, noise, share, reduced, between: See
            `graph_parts`.
        out (str): The folder to make.
        compress (bool): Whether graphs are written by zstd. Defaults to False.
        timed (Dataset, optional): Images on which the latency of each exit is measured, in ONNX
            Runtime with torch's number of threads. Defaults to the loader's. Without any a folder
            has no latencies, and takes no budget in time.

    Returns:
        dict: What was done, as in the manifest; with ``bytes``.

    Raises:
        UsageError: If something is missing, or does not fit.
    """
    for name in ('onnx', 'onnxruntime', *('zstandard',) * compress):
        need_for_deployment(name)
    require_new(out)
    graphed = graph_parts(
        cfg, path, loader, progress, images, method, noise, share, reduced, between
    )
    about = graphed.about
    about['latencies'] = _time(
        graphed.model, timed if timed is not None or loader is None else loader.dataset, progress
    )
    release_weights(graphed.parts)
    about['bytes'] = write_folder(
        out, cfg, graphed.model, graphed.contents, graphed.forms, about, compress
    )
    return about


def graph_parts(
    cfg: Config,
    path: str,
    loader: DataLoader | None = None,
    progress: Progress = lambda steps, what: steps,
    images: int = 200,
    method: str = 'mse',
    noise: float = 0.01,
    share: float = 0.1,
    reduced: bool | None = None,
    between: bool = True,
    half: bool = False,
) -> Graphed:
    """Make a graph of each part of a detector, and let them compute it.

    Args:
        cfg (Config): Of a plain or dynamic detector.
        path (str): Its checkpoint. One of a `QuantizationHook` brings ranges, which are used.
        loader (DataLoader, optional): Over validation images, by the config's test pipeline. With
            it, graphs are in 8 bits; without, in float32.
        progress (Callable): Wraps what is iterated over.
        images (int): How many images of it are looked at, at least 1.
        method (str): How ranges are found; see `Observer.ranges`.
        noise, share (float): Which layers stay float; see `prediction_layers` and `choose_float`.
        reduced (bool, optional): Whether weights have 7 bits. Defaults to what this processor
            needs, or to what was trained with.
        between (bool): Whether what is between layers has 8 bits, too, see `int8.BETWEEN`; but for
            SiLU where predictions are made. Trained ranges are of layers alone. Defaults to True.
        half (bool): Whether graphs are in float16 instead; the loader's images then say how
            difficulties move, if it is given. Defaults to False.

    Raises:
        UsageError: If something is missing, or does not fit.
    """
    if loader is not None and (images < 1 or not len(loader.dataset)):
        raise UsageError('int8 needs validation images to calibrate on, and there is none')
    eight = loader is not None and not half
    bare = copy.deepcopy(cfg)
    # It goes by latencies that are not measured yet; who loads the folder has it.
    whole_model(bare).pop('budget', None)
    model, checkpoint = load_detector(bare, path)
    trained = checkpoint.get('quantization') if eight else None
    exported = export_parts(model, fuse=trained is None)
    deployed, _ = load_detector(bare, checkpoint)
    if isinstance(deployed, DynamicDetector) and (
        doubt := calibrated_otherwise(deployed, checkpoint.get('meta', {}).get('calibration', {}))
    ):
        warnings.warn(doubt)
    parts = find_parts(deployed)
    contents = {name: part.content for name, part in exported.items()}
    about: dict[str, Any] = dict(
        int8=eight,
        versions={
            name: need_for_deployment(name).__version__ for name in ('torch', 'onnx', 'onnxruntime')
        },
        provenance=provenance(cfg, path, loader.dataset if loader is not None else (), 'cpu'),
    )
    before = None
    if loader is None:
        # Nothing was looked at.
        for name in ('ann_file', 'categories', 'classes', 'images'):
            del about['provenance'][name]
    else:
        batches = _first(loader, images)
        before = _calibrated_scores(deployed, batches, progress)
        about['provenance'].update(images=sum(len(batch['inputs']) for batch in batches))
    if half:
        contents = {name: halved(content) for name, content in contents.items()}
    if eight:
        contents, details = _int8(
            deployed,
            parts,
            exported,
            batches,
            progress,
            trained,
            method,
            noise,
            share,
            reduced,
            between,
        )
        about.update(details)
    _place(parts, contents, exported)
    place_roi_aligns(deployed)
    if before is not None:
        _carry_calibration(deployed, before, measure_difficulties(deployed, batches, progress))
    forms = {name: part.form for name, part in exported.items()}
    return Graphed(deployed, parts, contents, forms, about)


def _first(loader: DataLoader, images: int) -> list[dict]:
    """Batches until there are so many images. Loaders of videos have no batch size of their own."""
    batches: list[dict] = []
    for batch in loader:
        batches.append(batch)
        images -= len(batch['inputs'])
        if images <= 0:
            break
    return batches


def _place(
    parts: Sequence[DetectorPart],
    contents: Mapping[str, bytes],
    exported: Mapping[str, Exported],
    watch: Mapping[str, Callable] | None = None,
) -> None:
    for part in parts:
        part.place(
            Graph(
                contents[part.name],
                exported[part.name].form,
                watch=watch[part.name] if watch else None,
            )
        )


def _drive(model: BaseDetector, batches: Sequence[dict], progress: Progress, what: str) -> None:
    """Let images pass through all exits, as they are tested."""
    exits = getattr(model, 'num_exits', 1)
    with torch.no_grad():
        for batch in progress(batches, what):
            if not isinstance(model, DynamicDetector):
                model.test_step(batch)
                continue
            with preserved_budget(model):
                for exit in range(exits):
                    force_dynamic_exit(model, exit)
                    model.test_step(batch)


def _int8(
    model: BaseDetector,
    parts: Sequence[DetectorPart],
    exported: Mapping[str, Exported],
    batches: Sequence[dict],
    progress: Progress,
    trained: Mapping[str, Any] | None,
    method: str,
    noise: float,
    share: float,
    reduced: bool | None,
    between: bool,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Graphs in 8 bits, and what was found on the way."""
    observers = {part.name: Observer() for part in parts}
    feeds: dict[str, list[tuple[Tensor, ...]]] = {part.name: [] for part in parts}
    watching = {name: expose_layer_tensors(part.content) for name, part in exported.items()}
    for part in parts:
        part.place(
            _Kept(
                Graph(watching[part.name], exported[part.name].form, watch=observers[part.name]),
                feeds[part.name],
            )
        )
    _drive(model, batches, progress, 'calibration')
    if reduced is None:
        reduced = trained['reduced'] if trained else needs_reduced_range()
    ranges = {name: observer.ranges(method) for name, observer in observers.items()}
    contents, about_layers = {}, {}
    for part in progress(parts, 'layers'):
        content = exported[part.name].content
        spared, costs = (
            spared_layers(content, part),
            multiply_adds(content, observers[part.name].shares),
        )
        if trained:
            recipe = _trained(part, exported[part.name], trained, reduced)
            # Which layers stay float was decided before the training: the noise is measured alone.
            result = choose_float(content, recipe, feeds[part.name], costs, math.inf)
            result.share = sum(
                costs[name] for name in recipe.float_layers if name not in spared
            ) / (sum(cost for name, cost in costs.items() if name not in spared) or 1)
        else:
            predictions, predictions_share = (
                prediction_layers(content, costs, share) if part.predicts else ((), 0.0)
            )
            recipe = Recipe(
                ranges[part.name],
                (*spared, *predictions),
                reduced,
                (PLAIN_BETWEEN if part.predicts else BETWEEN) if between else (),
            )
            # Of the other layers, what is left of the share.
            result = choose_float(
                content,
                recipe,
                feeds[part.name],
                costs,
                noise,
                max(0.0, share - predictions_share) / (1 - predictions_share)
                if predictions_share < 1
                else 0.0,
            )
            result.share = predictions_share + result.share * (1 - predictions_share)
            recipe = replace(recipe, float_layers=(*recipe.float_layers, *result.chosen))
        contents[part.name] = quantize_graph(content, recipe)
        about_layers[part.name] = dict(
            float_layers=list(recipe.float_layers),
            float_share=result.share,
            noise_all_int8=result.before,
            noise=result.after,
        )
    images = sum(len(batch['inputs']) for batch in batches)
    return contents, dict(
        reduced_range=reduced,
        calibration=dict(images=images, ranges='trained' if trained else method),
        layers=about_layers,
    )


class _Kept:
    """A graph that keeps what reached it first."""

    def __init__(self, graph: Graph, feeds: list[tuple[Tensor, ...]]) -> None:
        self._graph, self._feeds = graph, feeds

    def __call__(self, *inputs: Tensor) -> Any:
        if len(self._feeds) < _TRIED:
            self._feeds.append(tuple(tensor.clone() for tensor in inputs))
        return self._graph(*inputs)


def _trained(
    part: DetectorPart, exported: Exported, trained: Mapping[str, Any], reduced: bool
) -> Recipe:
    """The recipe of a quantization-aware training."""
    plan = trace_quantization(
        part.run,
        exported.inputs,
        part.modules,
        part.spared,
        trained['float_share'] if part.predicts else 0.0,
    )
    prefix = f'{part.name}/'
    part_ranges = {
        key.removeprefix(prefix): value.tolist()
        for key, value in trained['ranges'].items()
        if key.startswith(prefix)
    }
    ranges, unknown = trained_ranges(exported.content, plan, part_ranges)
    return Recipe(ranges, unknown, reduced)


def _calibrated_scores(
    model: BaseDetector, batches: Sequence[dict], progress: Progress
) -> np.ndarray | None:
    """Sorted difficulties of some images, of a calibrated dynamic detector."""
    if not isinstance(model, DynamicDetector) or not len(model.difficulties):
        return None
    return measure_difficulties(model, batches, progress)


def _time(
    model: BaseDetector, dataset: Dataset | None, progress: Progress
) -> dict[str, Any] | None:
    """Measure the latency of each exit where graphs compute, in the place of torch's; None without
    images."""
    if dataset is None:
        regions = [math.nan] * 3 if getattr(model, 'regions', None) is not None else None
        put_latencies(model, [math.nan] * getattr(model, 'num_exits', 1), regions)
        return None
    images = min(_TIMED, len(dataset))
    seconds = measure_latency(model, dataset, progress, images, _ROUNDS)
    regions = measure_region_seconds(model, dataset, progress, images, _ROUNDS)
    put_latencies(model, seconds, regions)
    facts = {} if regions is None else dict(region_seconds=regions)
    return dict(seconds=seconds, **facts, images=images, batch_size=1, **timing_conditions())


def _carry_calibration(model: DynamicDetector, before: np.ndarray, after: np.ndarray) -> None:
    """Keep a calibration where difficulties have changed.

    The images that were calibrated on are many; those that int8 looks at are few, and may be easier
    or harder. So of the few counts only how their difficulties have moved. The calibration's and
    the thresholds move likewise: as many of the calibration's images are hard as before. So do the
    prices of regions, which an image's difficulty is one of.

    Args:
        model (DynamicDetector): With the calibration of the float detector.
        before, after (np.ndarray): Sorted difficulties of some images, (m,), in float and in 8
            bits.
    """
    for name in ('difficulties', 'threshold'):
        values = getattr(model, name)
        mapped = quantile_map(values.reshape(-1).numpy(), before, after)
        setattr(model, name, torch.from_numpy(mapped).view_as(values))
    if model.regions is not None and len(model.regions.curve):
        prices = model.regions.curve[1:-1, 0]
        prices.copy_(torch.from_numpy(quantile_map(prices.numpy(), before, after)).clamp(0, 1))

"""A detector as a folder that runs without this project: graphs from a picture to detections, a
JSON file, and the one file that runs them, `standalone_runtime`.

    first.onnx, second.onnx    the halves of a dynamic detector; detector.onnx of a plain one, or
                               both halves
    detector.json              thresholds, calibration, classes, how pictures are delivered, costs
    runtime.py                 `standalone_runtime`, as it is here; with regions, beside that as
                               whole_runtime.py and ``numerics``, `standalone_regions`

It is written whole or not at all. Nothing of a config or checkpoint is in it that could be run.
"""

import hashlib
import importlib
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import nn
from torch.utils.data import Dataset

from mmdet.models.detectors import BaseDetector
from mmdet.utils import get_test_pipeline_cfg

from ..building import load_detector
from ..errors import UsageError
from ..measuring.calibration import provenance
from ..measuring.flops import count_flops
from ..models import DynamicDetector
from ..models.branch import number_of_classes
from ..models.budget_control import calibrated_otherwise
from ..progress import Progress
from ..routing.box_merging import Merge
from ..routing.region_maps import linear_weights
from .deployment import Graphed
from .folder import require_new, write_files
from .graphs import need_for_deployment
from .latencies import timing_conditions
from .runtimes import CPU
from .standalone_graphs import (
    build_halves,
    export_halves,
    has_masks,
    join_halves,
    require_standalone,
)
from .standalone_model import first_pictures, time_standalone
from .standalone_parts import stand_in

#: Images that are timed at each exit, and whose operations are counted; how often each is timed.
_MEASURED, _ROUNDS = 10, 3
#: Steps of a test pipeline that change no pixel of a color picture.
_NEUTRAL = (
    'LoadImageFromFile',
    'LoadImageFromNDArray',
    'InferencerLoader',
    'LoadAnnotations',
    'PackDetInputs',
)
#: Settings of steps that `standalone_runtime` heeds, and those that must be as they are here.
_HEEDED = dict(
    Resize=('scale', 'keep_ratio', 'clip_object_border'),
    Pad=('size', 'size_divisor', 'pad_to_square', 'pad_val'),
    LoadImageFromFile=('backend_args', 'imdecode_backend'),
)
_FIXED = dict(
    Resize=dict(interpolation='bilinear', backend='cv2'),
    Pad=dict(padding_mode='constant'),
    LoadImageFromFile=dict(to_float32=False, color_type='color'),
)


#: What `standalone_regions` imports, in this package, of which it gets a copy.
_NUMERICS = (
    'errors.py',
    *(f'routing/{name}.py' for name in ('box_merging', 'region_cells', 'region_tree', 'regions')),
)


def export_standalone(
    cfg: Config,
    path: str,
    out: str,
    timed: Dataset | None = None,
    progress: Progress = lambda steps, what: steps,
    graphed: Graphed | None = None,
    one_file: bool = False,
) -> dict[str, Any]:
    """Write a detector as a folder that needs onnxruntime and numpy alone.

    Args:
        cfg (Config): Of a plain or dynamic detector, single- or two-stage or DINO.
        path (str): Its checkpoint.
        out (str): The folder to make.
        timed (Dataset, optional): Images of the config's test pipeline, on which seconds and GFLOPs
            of each exit are measured, in ONNX Runtime with torch's number of threads. Defaults to
            none: then they are not known.
        progress (Callable): Wraps what is iterated over.
        graphed (Graphed, optional): The same detector in 8 bits or float16, see `graph_parts`. It
            is of no other use afterwards. Defaults to none: all is float32.
        one_file (bool): Whether both halves stand in one graph, see `join_halves`. Defaults to
            False.

    Returns:
        dict: What detector.json has, and ``bytes``.

    Raises:
        UsageError: If something is missing, or cannot be exported so.
    """
    for name in ('onnx', 'onnxruntime'):
        need_for_deployment(name)
    require_new(out)
    delivery = read_delivery(cfg)
    model, checkpoint = load_detector(cfg, path)
    require_standalone(model)
    if isinstance(model, DynamicDetector) and graphed is None:
        doubt = calibrated_otherwise(model, checkpoint.get('meta', {}).get('calibration', {}))
        if doubt:
            warnings.warn(doubt)
    facts = _facts(model, cfg, graphed)
    halves = build_halves(model)
    contents = _contents(halves, graphed)
    if one_file and 'second' in contents:
        contents = dict(detector=join_halves(**contents))
    graphs = {f'{name}.onnx': content for name, content in contents.items()}
    if one_file and 'regions' in facts:
        raise UsageError('--one-file does not support regions: leave it out')
    runtime, runtimes = _runtime('regions' in facts)
    about: dict[str, Any] = dict(
        format=runtime.FORMAT,
        version=runtime.VERSION,
        graphs={name: hashlib.sha256(content).hexdigest() for name, content in graphs.items()},
        **facts,
        **delivery,
        precision='float32' if graphed is None else 'int8' if graphed.about['int8'] else 'float16',
        quantization={
            key: graphed.about[key]
            for key in ('reduced_range', 'calibration', 'layers')
            if graphed is not None and key in graphed.about
        },
        gflops=None,
        seconds=None,
        timing=None,
        made_with={
            name: need_for_deployment(name).__version__ for name in ('torch', 'onnx', 'onnxruntime')
        },
        provenance={
            key: value
            for key, value in provenance(cfg, path, (), 'cpu').items()
            # Nothing was looked at.
            if key not in ('ann_file', 'categories', 'classes', 'images')
        },
    )
    files = {**graphs, **runtimes}
    if timed is not None:
        pictures = first_pictures(timed, _MEASURED)
        about['gflops'] = _gflops(halves, pictures)
        about['seconds'] = _seconds(runtime, graphs, about, pictures, progress)
        about['timing'] = timing_conditions(providers=CPU)
    files[runtime.ABOUT] = _as_json(about)
    return dict(about, bytes=write_files(out, files))


def _contents(halves: dict[str, nn.Module], graphed: Graphed | None) -> dict[str, bytes]:
    """The ONNX files, by name."""
    if graphed is None:
        return export_halves(halves)
    stand_in(graphed.parts, graphed.contents, graphed.forms)
    return export_halves(build_halves(graphed.model, fuse=False), graphed.contents)


def _runtime(regions: bool) -> tuple[ModuleType, dict[str, bytes]]:
    """What runs a folder, and the files of that."""
    # They import onnxruntime, which is optional.
    whole, runtime = (
        importlib.import_module(f'.standalone_{name}', __package__)
        for name in ('runtime', 'regions')
    )
    if not regions:
        return whole, {'runtime.py': _source(whole)}
    package = Path(__file__).parents[1]
    files = {f'numerics/{name}': (package / name).read_bytes() for name in _NUMERICS}
    files.update({f'numerics/{folder}__init__.py': b'' for folder in ('', 'routing/')})
    return runtime, {'runtime.py': _source(runtime), 'whole_runtime.py': _source(whole), **files}


def _source(module: ModuleType) -> bytes:
    return Path(module.__file__).read_bytes()


def _as_json(about: Mapping[str, Any]) -> bytes:
    return json.dumps(about, indent=1, allow_nan=False).encode()


def _facts(model: BaseDetector, cfg: Config, graphed: Graphed | None) -> dict[str, Any]:
    """Classes, threshold and calibration; without the last two of a plain detector."""
    facts: dict[str, Any] = {}
    if has_masks(model):
        branch = model.branch(0) if isinstance(model, DynamicDetector) else model
        facts = dict(mask_threshold=float(branch.roi_head.test_cfg.mask_thr_binary))
    dynamic = isinstance(model, DynamicDetector)
    count = number_of_classes(model.branch(0) if dynamic else model)
    classes = (getattr(model, 'dataset_meta', None) or cfg.get('metainfo') or {}).get('classes')
    if classes is None or len(classes) != count:
        classes = map(str, range(count))
    if not dynamic:
        return dict(facts, classes=list(classes), threshold=None, difficulties=[])
    if graphed is not None:
        # With the budget of the config, and what difficulties have become.
        budget, model = model.budget, graphed.model
        if budget is not None:
            model.set_budget(budget)
    if model._budget_waits:
        # It says what is missing.
        model.set_budget(model.budget)
    if model.regions is not None:
        facts['regions'] = _regions(model)
    return dict(
        facts,
        classes=list(classes),
        threshold=float(model.threshold),
        difficulties=model.difficulties.tolist(),
    )


def _regions(model: DynamicDetector) -> dict[str, Any]:
    """What `standalone_regions` needs to choose regions and to join what is found there."""
    regions = model.regions
    return dict(
        **{name: getattr(regions, name) for name in ('cell', 'halo', 'limit', 'overhead')},
        **dict(step=regions.step, tile=regions.tile, first_size=model.first_size),
        divisor=model.data_preprocessor.pad_size_divisor,
        stride=model.stride,
        scale=model.scales[0],
        class_weights=regions.class_weights.tolist(),
        router=linear_weights(regions.router),
        merge=None if model.merge is None else _merge_as_dict(model.merge),
        # Threshold, share of pixels, number of regions, and GFLOPs, at each price.
        curve=regions.curve[:, :4].tolist(),
    )


def _merge_as_dict(merge: Merge) -> dict[str, Any]:
    more = dict(conf_type=merge.conf_type) if merge.type == 'wbf' else {}
    return dict(type=merge.type, iou=merge.iou, **more)


def read_delivery(cfg: Config) -> dict[str, Any]:
    """How a config's test pipeline resizes and pads pictures, as `standalone_runtime` heeds it.

    Returns:
        dict: ``resize``, None or ``scale`` and ``keep_ratio``; ``pad``, None or ``size`` (width and
        height, or None), ``square``, ``divisor`` and ``value``, of each color.

    Raises:
        UsageError: If a step or one of its settings is none that it knows.
    """
    delivery: dict[str, Any] = dict(resize=None, pad=None)
    for step in get_test_pipeline_cfg(cfg):
        kind = str(step['type']).removeprefix('mmdet.').removeprefix('mmcv.')
        _require_heeded(kind, step)
        if kind == 'Resize':
            if delivery['resize'] or delivery['pad']:
                raise _unheeded('a Resize behind another Resize or a Pad')
            scale = step.get('scale')
            scale = [scale] * 2 if isinstance(scale, int) else scale
            if not isinstance(scale, (list, tuple)) or min(scale) < 1:
                raise _unheeded(f'a Resize to {scale}')
            delivery['resize'] = dict(scale=list(scale), keep_ratio=step.get('keep_ratio', False))
        elif kind == 'Pad':
            if delivery['pad']:
                raise _unheeded('a Pad behind another')
            value = step.get('pad_val', 0)
            value = value.get('img', 0) if isinstance(value, Mapping) else value
            delivery['pad'] = dict(
                size=list(step['size']) if step.get('size') else None,
                square=step.get('pad_to_square', False),
                divisor=step.get('size_divisor') or 1,
                value=[value] * 3 if isinstance(value, (int, float)) else list(value),
            )
    return delivery


def _require_heeded(kind: str, step: Mapping[str, Any]) -> None:
    if kind not in (*_NEUTRAL, *_HEEDED):
        raise _unheeded(f'the step {kind}')
    for name, value in step.items():
        fixed = _FIXED.get(kind, {})
        if kind in _HEEDED and name != 'type' and name not in _HEEDED[kind]:
            if name not in fixed or value != fixed[name]:
                raise _unheeded(f'{name}={value!r} of {kind}')


def _unheeded(what: str) -> UsageError:
    return UsageError(
        f'--standalone cannot deliver images as the test pipeline does: it has {what}; runtime.py '
        'knows one bilinear Resize and then one Pad; change it in the config'
    )


@torch.no_grad()
def _gflops(halves: Mapping[str, nn.Module], pictures: Sequence[tuple]) -> list[float]:
    """Mean of each exit: 2 x multiply-adds of all that runs up to it."""
    totals = []
    for picture, *frame in pictures:
        inputs = [torch.from_numpy(picture)[None], *map(torch.tensor, np.float32(frame))]
        if 'detector' in halves:
            costs = [count_flops(lambda: halves['detector'](*inputs))[0]]
        else:
            maps = halves['first'].maps(inputs[0])
            costs = [
                count_flops(lambda: halves['first'](*inputs))[0],
                count_flops(lambda: halves['second'](*inputs, *maps))[0],
            ]
        totals.append(np.cumsum(costs) / 1e9)
    return np.mean(totals, axis=0).tolist()


def _seconds(
    runtime: ModuleType,
    graphs: Mapping[str, bytes],
    about: Mapping[str, Any],
    pictures: Sequence[tuple],
    progress: Progress,
) -> list[float]:
    """Median of each exit, of a picture that was delivered to its detections."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**graphs, runtime.ABOUT: _as_json(about)}.items():
            (Path(folder) / name).write_bytes(content)
        detector = runtime.Detector(folder, threads=torch.get_num_threads())
    return time_standalone(detector, pictures, progress, _ROUNDS)

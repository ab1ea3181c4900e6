"""Parts as ONNX graphs: made, and run."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample

from .. import errors
from ..cascade.parts import DetectorPart, Form, flatten, record_inputs, unflatten
from ..errors import UsageError
from ..measuring.latencies import force_dynamic_exit
from ..models import DynamicDetector, can_fuse
from ..models.detector_parts import find_parts
from ..models.fusing import fusible_parts
from ..private_mmengine import normalizes
from .runtimes import open_graph

#: Operators of 2021, which have scales for each channel. ONNX Runtime quantizes them, and reads
#: them for long.
OPSET = 17
#: Height and width of the example that parts are traced on. Unlike sides: no axis is mistaken for
#: another.
EXAMPLE_SIZE = (256, 320)


@dataclass(frozen=True)
class Exported:
    """A part as a graph.

    Attributes:
        content (bytes): The ONNX file.
        form: How its outputs are nested; see `cascade.parts.flatten`.
        inputs (tuple[Tensor]): What it was traced on.
    """

    content: bytes
    form: Form
    inputs: Sequence[Tensor]


class _Flat(nn.Module):
    """A part for the exporter."""

    def __init__(self, part: DetectorPart) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part.modules)
        self._run = part.run

    def forward(self, *inputs: Tensor) -> tuple:
        return tuple(flatten(self._run(*inputs))[0])


def export_parts(
    model: BaseDetector, size: Sequence[int] = EXAMPLE_SIZE, fuse: bool = True
) -> dict[str, Exported]:
    """Make a float32 graph of each part. Numbers of images, heights and widths are free.

    Args:
        model (BaseDetector): On the CPU, in eval mode. It is of no other use afterwards.
        size (Sequence[int]): Height and width of the example, of which the strides are divisors.
        fuse (bool): Whether a model's own parts are fused before, as YOLOv7's.

    Raises:
        UsageError: If a library is missing, the detector cannot be cut, or one of its layers cannot
            be in a graph.
    """
    need_for_deployment('onnx')
    exportable_parts(model)
    if fuse and can_fuse(model):
        # As `models.fuse`, but for what is made for torch on a CPU alone.
        fuse_conv_bn(model)
        for module in fusible_parts(model):
            module.fuse()
    parts = find_parts(model)
    inputs = example_inputs(model, parts, size)
    return {part.name: _export(part, inputs[part.name]) for part in parts}


def exportable_parts(model: BaseDetector) -> list[DetectorPart]:
    """`find_parts`, if all of their layers can be in a graph, as far as their types tell.

    Raises:
        UsageError: Names the layers that cannot.
    """
    parts = find_parts(model)
    names = {id(module): name for name, module in model.named_modules()}
    odd = {
        id(module): module
        for part in parts
        for whole in part.modules
        for module in whole.modules()
        if _is_mmcvs(type(module))
    }
    if odd:
        raise _no_operator(
            sorted({type(module).__name__ for module in odd.values()}),
            [names.get(key, '?') for key in odd],
        )
    return parts


def _is_mmcvs(kind: type) -> bool:
    """Whether a layer is computed by mmcv's own C++ operators, such as deformable convolution;
    losses are no layers."""
    files = (sys.modules.get(base.__module__) for base in kind.__mro__)
    return any(
        file.__name__.startswith('mmcv.ops.') and hasattr(file, 'ext_module')
        for file in files
        if file is not None
    ) and not kind.__name__.endswith('Loss')


def _no_operator(kinds: Sequence[str], layers: Sequence[str]) -> UsageError:
    more = f' and {len(layers) - 3} more' if len(layers) > 3 else ''
    return UsageError(
        f'{", ".join(kinds)} ({", ".join(layers[:3])}{more}) cannot be exported: ONNX Runtime has '
        'no such operator; train the detector with plain layers in their place'
    )


def example_inputs(
    model: BaseDetector, parts: Sequence[DetectorPart], size: Sequence[int]
) -> dict[str, tuple]:
    """What reaches each part when two images of noise pass through all exits."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).sub(0.5).mul(4)
    if not normalizes(model.data_preprocessor):
        images = images * 50 + 100
    shape = dict(
        img_shape=tuple(size),
        ori_shape=tuple(size),
        batch_input_shape=tuple(size),
        pad_shape=tuple(size),
        scale_factor=(1.0, 1.0),
    )
    samples = [DetDataSample(metainfo=dict(shape, img_id=index)) for index in range(2)]
    for sample in samples:
        sample.gt_instances = InstanceData()

    def drive() -> None:
        for exit in range(getattr(model, 'num_exits', 1)):
            if isinstance(model, DynamicDetector):
                force_dynamic_exit(model, exit)
            model.predict(images, samples)

    inputs = record_inputs(parts, drive)
    missing = [part.name for part in parts if part.name not in inputs]
    if missing:
        raise UsageError(
            f'nothing reached {", ".join(missing)} of {type(model).__name__}: it has no part in '
            'prediction, or its weights are untrained'
        )
    return inputs


def _export(part: DetectorPart, inputs: Sequence[Tensor]) -> Exported:
    with torch.no_grad():
        tensors, form = flatten(part.run(*inputs))
    input_names = [f'in{index}' for index in range(len(inputs))]
    output_names = [f'out{index}' for index in range(len(tensors))]
    axes = {
        name: {axis: f'{name}_{axis}' for axis in range(tensor.dim()) if axis != 1}
        for name, tensor in zip(input_names + output_names, [*inputs, *tensors])
    }
    file = io.BytesIO()
    # By tracing: with torch.export a graph takes twenty times as long, and is the same.
    try:
        with quiet_export():
            torch.onnx.export(
                _Flat(part).eval(),
                tuple(inputs),
                file,
                input_names=input_names,
                output_names=output_names,
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:
        # Operators of others fail in their own ways.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"the part '{part.name}' cannot be exported: {reason}") from error
    require_standard(file.getvalue(), part.name)
    return Exported(file.getvalue(), form, inputs)


def require_standard(content: bytes, part: str) -> None:
    """Raise a `UsageError` if a graph has operators of another's, which ONNX Runtime lacks: of
    functions that are no layers, and so not seen before."""
    odd = [
        node
        for node in need_for_deployment('onnx').load_from_string(content).graph.node
        if node.domain not in ('', 'ai.onnx')
    ]
    if odd:
        # Nodes are named by the layers that they were traced in.
        layers = dict.fromkeys(
            f'{part}: {node.name.rpartition("/")[0].strip("/") or node.name}' for node in odd
        )
        raise _no_operator(sorted({node.op_type for node in odd}), list(layers))


@contextlib.contextmanager
def quiet_export():
    """What the tracer says of Python's branches on sizes. Agreement is tested, on other sizes
    too."""
    logger = logging.getLogger('torch.onnx')
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(before)


class Graph:
    """A part, run by a runtime. What it is given may be on any device and of any type; what it
    gives is on the same device.

    Args:
        content (bytes): An ONNX file.
        form: How its outputs are nested; see `cascade.parts.flatten`.
        threads (int, optional): Defaults to torch's.
        watch (Callable, optional): Is shown all that enters and leaves, arrays by name.
        runtime (str): What runs it, see `open_graph`. Defaults to 'onnxruntime'.
        providers (Sequence[str], optional): Of ONNX Runtime, see `open_graph`.
    """

    def __init__(
        self,
        content: bytes,
        form: Form,
        threads: int | None = None,
        watch: Callable[[dict[str, Any]], None] | None = None,
        runtime: str = 'onnxruntime',
        providers: Sequence[str] | None = None,
    ) -> None:
        self._graph = open_graph(content, runtime, threads, providers)
        self._form, self._watch = form, watch

    def arrays(self, *inputs: Tensor) -> dict[str, Any]:
        """All outputs, as numpy arrays by name, in order."""
        return dict(zip(self._graph.outputs, self._graph.run(self._feed(inputs))))

    def _tensors(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: inputs[int(name.removeprefix('in'))] for name in self._graph.inputs}

    def _feed(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        return {name: _as_array(value) for name, value in self._tensors(inputs).items()}

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the graph: tensors as the part is given them, results as it gives them. On a GPU of
        CUDA, where ONNX Runtime computes there, they stay on it."""
        device = inputs[0].device
        if self._watch is None and self._graph.takes(device):
            feed = {name: _as_known(value) for name, value in self._tensors(inputs).items()}
            named = zip(self._graph.outputs, self._graph.run_there(feed))
            return unflatten([value for name, value in named if is_output(name)], self._form)
        arrays = self.arrays(*inputs)
        if self._watch is not None:
            self._watch({**self._feed(inputs), **arrays})
        outputs = [
            torch.from_numpy(array).to(device) for name, array in arrays.items() if is_output(name)
        ]
        return unflatten(outputs, self._form)


def _as_known(value: Tensor) -> Tensor:
    """Graphs know no floats but float32, also under AMP."""
    return value.detach().float() if value.is_floating_point() else value.detach()


def _as_array(value: Tensor) -> np.ndarray:
    """On the CPU."""
    return _as_known(value).cpu().contiguous().numpy()


def is_output(name: str) -> bool:
    """Whether a tensor is one of a part's outputs, as `export_parts` names them."""
    return name.startswith('out') and name[3:].isdigit()


def release_weights(parts: Sequence[DetectorPart]) -> None:
    """Let go of the weights, and the statistics of norms, that graphs have now. Images with padding
    are still scored by torch."""
    spared = [module for part in parts for module in part.spared]
    kept = {id(tensor) for module in spared for tensor in (*module.parameters(), *module.buffers())}
    for module in (layer for part in parts for whole in part.modules for layer in whole.modules()):
        tensors = dict(module.named_parameters(recurse=False))
        if isinstance(module, _BatchNorm):
            tensors.update(module.named_buffers(recurse=False))
        for name in (name for name, tensor in tensors.items() if id(tensor) not in kept):
            setattr(module, name, None)


def need_for_deployment(name: str) -> ModuleType:
    """An optional library."""
    return errors.import_optional(name, 'graphs', 'deploy')

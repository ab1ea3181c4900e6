"""What computes a graph: ONNX Runtime, or on a CPU OpenVINO, from the same file."""

import io
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from ..errors import UsageError

#: ONNX Runtime's providers: on a CPU, and those that are taken unasked where they are there, the
#: first that can.
CPU = ('CPUExecutionProvider',)
PREFERRED = ('CUDAExecutionProvider', *CPU)
#: What tensors of graphs may hold.
_NUMPY = {torch.float32: np.float32, torch.int64: np.int64}


def chosen_providers(providers: Sequence[str] | None = None) -> list[str]:
    """ONNX Runtime's providers that are asked for, or, unasked, the best that are there; see
    `open_graph`."""
    there = errors.import_optional('onnxruntime', 'graphs', 'deploy').get_available_providers()
    providers = (
        [provider for provider in PREFERRED if provider in there]
        if providers is None
        else list(providers)
    )
    if not providers or not set(providers) <= set(there):
        raise UsageError(
            f"ONNX Runtime's providers here are {', '.join(there)}; got "
            f'{", ".join(providers) or "none"}'
        )
    return providers


class OnnxRuntime:
    """A graph in ONNX Runtime.

    Args:
        content (bytes): An ONNX file.
        threads (int): How many.
        providers (Sequence[str], optional): See `open_graph`.

    Attributes:
        inputs, outputs (list[str]): Their names. Inputs that change nothing are not in a graph.
        metadata (dict[str, str]): The file's.
    """

    def __init__(
        self, content: bytes, threads: int, providers: Sequence[str] | None = None
    ) -> None:
        runtime = errors.import_optional('onnxruntime', 'graphs', 'deploy')
        providers = chosen_providers(providers)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Graphs take turns: threads of one that wait in a loop would take time from the next.
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(content, options, providers=providers)
        self.inputs = [graph_input.name for graph_input in self._session.get_inputs()]
        self.outputs = [graph_output.name for graph_output in self._session.get_outputs()]
        self.metadata = self._session.get_modelmeta().custom_metadata_map

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """All outputs, in order, for numpy arrays by name."""
        return self._session.run(None, feed)

    def takes(self, device: torch.device) -> bool:
        """Whether tensors can stay where they are, see `run_there`."""
        return device.type == 'cuda' and self._session.get_providers()[0] == PREFERRED[0]

    def run_there(self, feed: Mapping[str, Tensor]) -> list[Tensor]:
        """All outputs, in order, for tensors by name, all on one device, the CPU or a GPU of CUDA:
        nothing is copied to another one."""
        binding, kept = self._session.io_binding(), []
        for name, tensor in feed.items():
            kept.append(tensor.contiguous())
            binding.bind_input(
                name,
                tensor.device.type,
                tensor.device.index or 0,
                _NUMPY[tensor.dtype],
                tuple(tensor.shape),
                kept[-1].data_ptr(),
            )
        device = kept[0].device
        for name in self.outputs:
            binding.bind_output(name, device.type, device.index or 0)
        if device.type == 'cuda':
            # ONNX Runtime computes in a stream of its own.
            torch.cuda.current_stream(device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return [torch.from_dlpack(value) for value in binding.get_outputs()]


class OpenVino:
    """The same in OpenVINO, whose integers use AMX where the processor has it.

    A graph is compiled for each size of its inputs when that first comes, in about a second: with
        free heights and widths
    maps came out wrong (2025.4 to 2026.4), with a free first axis it is slower. Rows are added
    where there are many, so that few sizes occur. One call at a time.

    Args, attributes: See `OnnxRuntime`.
    """

    #: How many sizes are kept, those that came last.
    KEPT = 32

    def __init__(
        self, content: bytes, threads: int, providers: Sequence[str] | None = None
    ) -> None:
        if providers is not None:
            raise UsageError('providers are of ONNX Runtime; OpenVINO runs on the CPU')
        openvino = errors.import_optional('openvino', 'graphs in OpenVINO', 'openvino')
        file = errors.import_optional('onnx', 'graphs', 'deploy').load_model_from_string(content)
        self._core = openvino.Core()
        self._model = self._core.read_model(io.BytesIO(content))
        known = {name for graph_input in self._model.inputs for name in graph_input.get_names()}
        self.inputs = [
            graph_input.name for graph_input in file.graph.input if graph_input.name in known
        ]
        self.outputs = [graph_output.name for graph_output in file.graph.output]
        self.metadata = {entry.key: entry.value for entry in file.metadata_props}
        self._settings = {
            'INFERENCE_NUM_THREADS': threads,
            'NUM_STREAMS': 1,
            # Two processes would be bound to the same cores.
            'ENABLE_CPU_PINNING': False,
            # What is float stays float32: by default it would be bfloat16 where the processor has
            # that.
            'INFERENCE_PRECISION_HINT': 'f32',
        }
        self._requests: OrderedDict = OrderedDict()
        self._lock = threading.Lock()

    def takes(self, device: torch.device) -> bool:
        """Tensors of a GPU are copied."""
        return False

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """All outputs, in order, for numpy arrays by name. They have as many rows as the last
        input; all inputs have, but for the maps that RoIs are of."""
        whole = {name: _lengthened(array) for name, array in feed.items()}
        with self._lock:
            outputs = self._request(tuple(whole[name].shape for name in self.inputs)).infer(
                whole, share_inputs=True
            )
        rows = len(feed[self.inputs[-1]])
        return [outputs[index][:rows] for index in range(len(self.outputs))]

    def _request(self, sizes: tuple[tuple[int, ...], ...]) -> Any:
        if sizes not in self._requests:
            model = self._model.clone()
            model.reshape(dict(zip(self.inputs, sizes)))
            self._requests[sizes] = self._core.compile_model(
                model, 'CPU', self._settings
            ).create_infer_request()
            if len(self._requests) > self.KEPT:
                self._requests.popitem(last=False)
        self._requests.move_to_end(sizes)
        return self._requests[sizes]


def _lengthened(array: np.ndarray) -> np.ndarray:
    """With rows of zeros at its end: 1 to 8, a multiple of 8, from 64 on one of 100 (RPNs propose
    1000)."""
    rows = len(array)
    step = 1 if rows <= 8 else 8 if rows <= 64 else 100
    count = max(-(-rows // step) * step, 1)
    if rows == count:
        return array
    whole = np.zeros((count, *array.shape[1:]), array.dtype)
    whole[:rows] = array
    return whole


RUNTIMES: dict[str, type] = dict(onnxruntime=OnnxRuntime, openvino=OpenVino)


def open_graph(
    content: bytes,
    runtime: str = 'onnxruntime',
    threads: int | None = None,
    providers: Sequence[str] | None = None,
) -> Any:
    """A graph, ready to run.

    Args:
        content (bytes): An ONNX file.
        runtime (str): 'onnxruntime' (the default) or 'openvino'.
        threads (int, optional): Defaults to torch's.
        providers (Sequence[str], optional): What ONNX Runtime computes with, the first that can,
            such as 'CUDAExecutionProvider'. Defaults to CUDA's, where its package has it, and then
            the CPU's.

    Raises:
        UsageError: If there is no such runtime or provider, it is not installed, or threads are
            negative.
    """
    if threads is not None and threads < 0:
        raise UsageError(f'threads must not be negative, got {threads}')
    if runtime not in RUNTIMES:
        raise UsageError(f'runtime must be one of {", ".join(RUNTIMES)}, got {runtime!r}')
    return RUNTIMES[runtime](content, threads or torch.get_num_threads(), providers)

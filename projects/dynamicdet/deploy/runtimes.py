"""What computes a graph on a CPU: ONNX Runtime, or OpenVINO, from the same file."""
import io
import threading
from functools import lru_cache
from typing import Any, Dict, List, Mapping, Optional, Tuple, Type

import numpy as np
import torch

from .. import errors
from ..errors import UsageError


class OnnxRuntime:
    """A graph in ONNX Runtime.

    Args:
        content (bytes): An ONNX file.
        threads (int): How many.

    Attributes:
        inputs, outputs (list[str]): Their names. Inputs that change nothing are not in a graph.
        metadata (dict[str, str]): The file's.
    """

    def __init__(self, content: bytes, threads: int) -> None:
        runtime = errors.need('onnxruntime', 'graphs', 'deploy')
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Graphs take turns: threads of one that wait in a loop would take time from the next.
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
        self.inputs = [one.name for one in self._session.get_inputs()]
        self.outputs = [one.name for one in self._session.get_outputs()]
        self.metadata = self._session.get_modelmeta().custom_metadata_map

    def run(self, feed: Mapping[str, Any]) -> List[Any]:
        """All outputs, in order, for numpy arrays by name."""
        return self._session.run(None, feed)


class OpenVino:
    """The same in OpenVINO, whose integers use AMX where the processor has it.

    For each size of its inputs a graph is made ready when that first comes, which takes a second: with free heights and
    widths maps came out wrong (2025.4 to 2026.4), with a free first axis it is slower. Of many RoIs some more are
    computed, so that their numbers are few.
    """

    #: How many sizes are kept, those that came last.
    KEPT = 16
    #: More rows than `FEW` are made a multiple of `STEP`; 1000, what detectors often propose, is one.
    FEW, STEP = 16, 100

    def __init__(self, content: bytes, threads: int) -> None:
        openvino = errors.need('openvino', 'graphs in OpenVINO', 'openvino')
        file = errors.need('onnx', 'graphs', 'deploy').load_model_from_string(content)
        self._core = openvino.Core()
        self._model = self._core.read_model(io.BytesIO(content))
        known = {name for one in self._model.inputs for name in one.get_names()}
        self.inputs = [one.name for one in file.graph.input if one.name in known]
        self.outputs = [one.name for one in file.graph.output]
        self.metadata = {one.key: one.value for one in file.metadata_props}
        self._settings = {
            'INFERENCE_NUM_THREADS': threads,
            'NUM_STREAMS': 1,
            # Two processes would be bound to the same cores.
            'ENABLE_CPU_PINNING': False,
            # What is float stays float32: by default it would be bfloat16 where the processor has that.
            'INFERENCE_PRECISION_HINT': 'f32',
        }
        self._compiled = lru_cache(self.KEPT)(self._compile)
        self._lock, self._own = threading.Lock(), threading.local()

    def _compile(self, *sizes: Tuple[int, ...]) -> Any:
        model = self._model.clone()
        model.reshape(dict(zip(self.inputs, sizes)))
        return self._core.compile_model(model, 'CPU', self._settings)

    def _request(self, *sizes: Tuple[int, ...]) -> Any:
        """A request is of one thread at a time."""
        if not hasattr(self._own, 'request'):
            self._own.request = lru_cache(self.KEPT)(lambda *sizes: self._compiled(*sizes).create_infer_request())
        with self._lock:
            return self._own.request(*sizes)

    def run(self, feed: Mapping[str, Any]) -> List[Any]:
        """All outputs, in order, for numpy arrays by name. They have as many rows as the last input: all have, but for
        the maps that RoIs are taken from."""
        whole = {name: self._lengthened(array) for name, array in feed.items()}
        found = self._request(*(whole[name].shape for name in self.inputs)).infer(whole, share_inputs=True)
        rows = len(feed[self.inputs[-1]])
        return [found[index][:rows] for index in range(len(self.outputs))]

    def _lengthened(self, array: np.ndarray) -> np.ndarray:
        """With rows of zeros at its end."""
        rows = len(array)
        count = max(rows, 1) if rows <= self.FEW else -(-rows // self.STEP) * self.STEP
        if rows == count:
            return array
        whole = np.zeros((count, *array.shape[1:]), array.dtype)
        whole[:rows] = array
        return whole


RUNTIMES: Dict[str, Type] = dict(onnxruntime=OnnxRuntime, openvino=OpenVino)


def open_graph(content: bytes, runtime: str = 'onnxruntime', threads: Optional[int] = None) -> Any:
    """A graph, ready to run.

    Args:
        content (bytes): An ONNX file.
        runtime (str): 'onnxruntime' (the default) or 'openvino'.
        threads (int, optional): Defaults to torch's.

    Raises:
        UsageError: If there is no such runtime, or it is not installed.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    return RUNTIMES[runtime](content, threads or torch.get_num_threads())

"""A folder that holds a detector for use: graphs, a config, what torch still needs, and a manifest.

    manifest.json      parts and how their outputs are nested, versions, provenance, latencies and
    what they
                       were measured with, SHA-256 of all files
    config.json        the config, as data: reading it runs nothing
    state.pth          what is not in the graphs: router, thresholds, calibration
    first.onnx, ...    a graph for each part; first.onnx.zst, ... by zstd

It is written whole or not at all, and a folder that was changed is refused.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS

from ..apis import DynamicInferencer
from ..checkpoints import read_checkpoint, weights_only
from ..errors import UsageError
from ..models import DynamicDetector
from ..models.detector_parts import find_parts
from ..timing import timed_elsewhere
from .graphs import Graph, need_for_deployment, release_weights
from .latencies import put_latencies, timing_conditions
from .roi_align import place_roi_aligns

FORMAT, VERSION = 'dynamicdet.deployed', 6
MANIFEST, CONFIG, STATE = 'manifest.json', 'config.json', 'state.pth'
#: What a folder that needs nothing of this project has in the place of a manifest.
STANDALONE = 'detector.json'
#: How graphs are called, as they are and by zstd.
_GRAPH, _SMALL = '.onnx', '.onnx.zst'


def write_folder(
    out: str,
    cfg: Config,
    model: BaseDetector,
    graphs: Mapping[str, bytes],
    forms: Mapping[str, Any],
    about: Mapping[str, Any],
    compress: bool = False,
) -> int:
    """Write a deployment folder.

    Args:
        out (str): The folder. It must not be there yet.
        cfg (Config): The detector's.
        model (BaseDetector): With graphs in place; its other state is kept.
        graphs (Mapping[str, bytes]): ONNX file of each part, in order.
        forms (Mapping): How each part's outputs are nested.
        about (Mapping): For the manifest: plain data.
        compress (bool): Whether graphs are written by zstd: smaller files, as fast once they are
            loaded. Defaults to False.

    Returns:
        int: Bytes written.
    """
    require_new(out)
    suffix = _SMALL if compress else _GRAPH
    state = io.BytesIO()
    torch.save(model.state_dict(), state)
    files = {
        f'{name}{suffix}': _compressed(content) if compress else content
        for name, content in graphs.items()
    }
    files[CONFIG] = json.dumps(_plain(cfg.to_dict()), indent=1).encode()
    files[STATE] = state.getvalue()
    manifest = dict(
        format=FORMAT,
        version=VERSION,
        stages=[
            dict(name=name, file=f'{name}{suffix}', size=len(content), form=forms[name])
            for name, content in graphs.items()
        ],
        dataset_meta=_plain(dict(getattr(model, 'dataset_meta', None) or {})),
        **about,
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )
    manifest['sha256'] = _digest(manifest)
    files[MANIFEST] = json.dumps(manifest, indent=1).encode()
    return write_files(out, files)


def write_files(out: str, files: Mapping[str, bytes]) -> int:
    """Write a folder of files: all of them, or nothing.

    Args:
        out (str): The folder. It must not be there yet, or be empty.
        files (Mapping[str, bytes]): Name -> content.

    Returns:
        int: Bytes written.

    Raises:
        UsageError: If it is there already.
    """
    require_new(out)
    target = Path(out).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f'.{target.name}.'))
    try:
        for name, content in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            with open(temporary / name, 'wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        try:
            if target.is_dir():
                target.rmdir()
            os.rename(temporary, target)
        except OSError:
            # Another run was faster.
            require_new(out)
            raise
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return sum(map(len, files.values()))


def require_new(out: str) -> None:
    """Raise a `UsageError` if a folder is there already and not empty."""
    if Path(out).exists() and not (Path(out).is_dir() and not any(Path(out).iterdir())):
        raise UsageError(f"'{out}' is there already: name a folder that is not, or remove it")


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a deployment folder, whose files are looked through.

    Raises:
        UsageError: If it is none, or one of its files is missing or was changed.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"'{folder}' is no deployed detector: it has no {MANIFEST}; tools/export.py makes one"
        )
    try:
        manifest = json.loads(path.read_text(encoding='utf-8'))
        known = manifest.pop('sha256') == _digest(manifest) and manifest['format'] == FORMAT
    except (ValueError, KeyError, AttributeError, TypeError):
        known = False
    if not known:
        raise UsageError(f"'{path}' is damaged: export the detector again")
    if manifest['version'] != VERSION:
        raise UsageError(
            f"'{folder}' is of version {manifest['version']} of the format, and this package reads "
            f'{VERSION}: export the detector again'
        )
    for name, digest in manifest['files'].items():
        file = Path(folder) / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise UsageError(f"'{file}' is missing or was changed: export the detector again")
    return manifest


def read_deployed_config(folder: str) -> Config:
    """The config of a deployment folder."""
    read_manifest(folder)
    return Config(_restored(json.loads((Path(folder) / CONFIG).read_text(encoding='utf-8'))))


def load_deployed(
    folder: str,
    threads: int | None = None,
    runtime: str = 'onnxruntime',
    providers: Sequence[str] | None = None,
) -> BaseDetector:
    """Load a detector that graphs compute. It is used as any other: `predict`, `test_step`, mmdet's
    `inference_detector`, budgets. One in time goes by the folder's latencies, and warns where they
    were measured by another runtime, with other threads or on another machine;
    `latencies.measure_latency` and `latencies.put_latencies` measure anew.

    Args:
        folder (str): As tools/export.py writes it.
        threads (int, optional): Of each graph. Defaults to torch's.
        runtime (str): What runs the graphs, see `runtimes.open_graph`. Defaults to 'onnxruntime'.
        providers (Sequence[str], optional): Of ONNX Runtime, see there. Defaults to the best that
            is there.

    Raises:
        UsageError: If it is no deployment folder, was changed, a library is missing, or there is no
            such runtime or provider.
    """
    manifest, cfg = read_manifest(folder), read_deployed_config(folder)
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model).eval()
    parts = find_parts(model)
    if [part.name for part in parts] != [stage['name'] for stage in manifest['stages']]:
        raise UsageError(
            f"'{folder}' is of another version of this package: export the detector again"
        )
    for part, stage in zip(parts, manifest['stages']):
        part.place(
            Graph(
                _read_graph(Path(folder) / stage['file'], stage['size']),
                stage['form'],
                threads,
                runtime=runtime,
                providers=providers,
            )
        )
    release_weights(parts)
    place_roi_aligns(model, threads, runtime)
    with weights_only():
        state = torch.load(Path(folder) / STATE, map_location='cpu', weights_only=True)
    if isinstance(model, DynamicDetector):
        model.timed_elsewhere = timed_elsewhere(
            manifest['latencies'] or {}, timing_conditions(runtime, threads, providers)
        )
    model.load_state_dict(state)
    model.cfg, model.dataset_meta = cfg, _restored(manifest['dataset_meta'])
    return model


def open_detector(
    config: Config | str, checkpoint: str | None = None, device: str | None = None
) -> DynamicInferencer:
    """A dynamic detector for pictures: of a config and its checkpoint, or of a deployment folder.

    Args:
        config (Config or str): A config, or the path of a folder as tools/export.py writes it.
        checkpoint (str, optional): Of a config.
        device (str, optional): Of a config. Defaults to the best that is there.

    Raises:
        UsageError: If it is neither, or the detector is not dynamic.
    """
    if isinstance(config, Config):
        if checkpoint is None:
            raise UsageError('a config needs its checkpoint: give its path behind the config')
        # Before mmengine does, which would answer with a trace.
        read_checkpoint(checkpoint)
        return DynamicInferencer(config, checkpoint, device, show_progress=False)
    if checkpoint is not None or device not in (None, 'cpu'):
        raise UsageError(f"'{config}' is a folder: it takes no checkpoint and no device")
    if (Path(config) / STANDALONE).is_file():
        raise UsageError(
            f"'{config}' stands alone, and runtime.py in it runs it: export the detector without "
            '--standalone'
        )
    cfg = read_deployed_config(config)
    cfg.model = dict(type='DeployedDetector', folder=config)
    detector = DynamicInferencer(cfg, device='cpu', show_progress=False)
    detector.model.dataset_meta = _restored(read_manifest(config)['dataset_meta'])
    return detector


@MODELS.register_module(name='DeployedDetector')
def load_deployed_detector(
    folder: str,
    threads: int | None = None,
    budget: dict | None = None,
    data_preprocessor: dict | None = None,
    runtime: str = 'onnxruntime',
    providers: Sequence[str] | None = None,
    latencies: Sequence[float] | None = None,
    region_seconds: Sequence[float] | None = None,
) -> BaseDetector:
    """`load_deployed` for configs: ``model=dict(type='DeployedDetector', folder=...)``.

    Args:
        folder, threads, runtime, providers: See there.
        budget (dict, optional): A dynamic detector's speed; see `DynamicDetector`.
        data_preprocessor: The folder's counts; Runners fill this in.
        latencies (Sequence[float], optional): Of each exit, seconds, measured anew. Defaults to the
            folder's.
        region_seconds (Sequence[float], optional): With these, of regions; see
            `latencies.measure_region_seconds`.
    """
    model = load_deployed(folder, threads, runtime, providers)
    if latencies:
        put_latencies(model, latencies, region_seconds)
        budget = budget or getattr(model, 'budget', None)
    if budget:
        if not hasattr(model, 'set_budget'):
            raise UsageError(f"'{folder}' holds a plain detector, which has no budget")
        model.set_budget(budget)
    return model


def _compressed(content: bytes) -> bytes:
    # What level 19 saves beyond is 1 %, in ten times the time.
    return need_for_deployment('zstandard').ZstdCompressor(level=3).compress(content)


def _read_graph(path: Path, size: int) -> bytes:
    """An ONNX file, no larger than the manifest says."""
    content = path.read_bytes()
    if path.name.endswith(_SMALL):
        zstandard = need_for_deployment('zstandard')
        if zstandard.frame_content_size(content) != size:
            raise UsageError(f"'{path}' is damaged: export the detector again")
        content = zstandard.ZstdDecompressor().decompress(content)
    return content


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """As JSON holds it; tuples are told from lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return {'()': [_plain(item) for item in value]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise UsageError(
        f'the config holds a {type(value).__name__}, {value!r}, which cannot be written as data'
    )


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {'()'}:
            return tuple(_restored(item) for item in value['()'])
        return ConfigDict({key: _restored(entry) for key, entry in value.items()})
    return [_restored(item) for item in value] if isinstance(value, list) else value

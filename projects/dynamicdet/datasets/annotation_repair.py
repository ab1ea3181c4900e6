"""Let mmdet's data sets and metrics, which read annotation files for themselves, read them as our
tools do."""

import os.path as osp
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmengine.registry import Registry

from mmdet.datasets import CocoDataset, CocoPanopticDataset, LVISV05Dataset
from mmdet.evaluation import CocoMetric, LVISMetric
from mmdet.registry import DATASETS, METRICS

from ..annotations import AnnotationFile, mended_copy, read_annotations
from ..errors import UsageError
from .config_datasets import SPLITS
from .video import VideoDataset


def mend_annotations(
    cfg: Mapping, splits: Sequence[str], folder: str | Path
) -> tuple[dict[str, AnnotationFile], list[str]]:
    """Read the COCO annotation files of a config's data sets and evaluators. Where one needs
    mending, the config then names a copy; the file itself stays as it is.

    Args:
        cfg (Config): mmengine's config; ``ann_file`` in it may change.
        splits (Sequence[str]): Which, of 'train', 'val' and 'test'.
        folder (str or Path): Where copies go.

    Returns:
        tuple: What was read, by the paths that the config then has, files that are not there left
            out; and what was mended, a line each.

    Raises:
        UsageError: If a file cannot be used.
    """
    read: dict[str, AnnotationFile] = {}
    copies: dict[str, str] = {}
    lines: list[str] = []
    for split in splits:
        used: list[str] = []
        for part, name in (
            ('dataloader', f'the {SPLITS[split]} set'),
            ('evaluator', f'{split}_evaluator'),
        ):
            for node in _readers(
                cfg.get(f'{split}_{part}'), DATASETS if part == 'dataloader' else METRICS
            ):
                path = _path_of(node)
                if path not in copies:
                    file = read_for(name, path, learns_masks(cfg))
                    copies[path] = mended_copy(path, folder) if file.mended else path
                    read[copies[path]] = file
                    lines += [f'{name}: {line}' for line in file.mended]
                if copies[path] != path:
                    node['ann_file'] = copies[path]
                if part == 'evaluator' and copies[path] not in used:
                    _require_same_numbers(name, path, copies[path], used, read)
                elif part == 'dataloader':
                    used.append(copies[path])
    return read, lines


def read_for(name: str, path: str, outlines: bool) -> AnnotationFile:
    """`read_annotations`, with a data set's name in front of what it refuses."""
    try:
        return read_annotations(path, outlines)
    except UsageError as error:
        raise error if name == f"'{path}'" else UsageError(f'{name}: {error}') from None


def learns_masks(cfg: Mapping) -> bool:
    """Whether a config loads or evaluates masks; a record of any of its data then needs them."""

    def wants(node: Any) -> bool:
        if isinstance(node, Mapping):
            metric = node.get('metric')
            metrics = metric if isinstance(metric, (list, tuple)) else [metric]
            return (
                bool(node.get('with_mask')) or 'segm' in metrics or any(map(wants, node.values()))
            )
        return isinstance(node, (list, tuple)) and any(map(wants, node))

    return any(
        wants(cfg.get(f'{split}_{part}'))
        for split in SPLITS
        for part in ('dataloader', 'evaluator')
    )


def is_turned(dataset: Any) -> bool:
    """Whether a data set's pipeline loads pictures as EXIF's orientation wants, as mmcv does if not
    told otherwise."""
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    return all(
        step.color_type in ('color', 'grayscale') and step.imdecode_backend != 'turbojpeg'
        for step in steps
        if isinstance(step, LoadImageFromFile)
    )


def _readers(node: Any, registry: Registry) -> Iterator[dict]:
    """Parts of a config that read a COCO annotation file which is there."""
    if isinstance(node, (list, tuple)):
        for inner in node:
            yield from _readers(inner, registry)
    elif isinstance(node, dict):
        named = isinstance(node.get('ann_file'), str) and _reads_coco(node.get('type'), registry)
        if named and osp.isfile(_path_of(node)):
            yield node
        for key in ('dataset', 'datasets'):
            yield from _readers(node.get(key), registry)


def _reads_coco(kind: Any, registry: Registry) -> bool:
    kind = registry.get(kind) if isinstance(kind, str) else kind
    # Subclasses by name, but with annotations of another form.
    others = (CocoPanopticDataset, LVISV05Dataset, LVISMetric)
    return (
        isinstance(kind, type)
        and not issubclass(kind, others)
        and (
            issubclass(kind, (CocoDataset, VideoDataset, CocoMetric))
            or getattr(kind, 'reads_coco_annotations', False)
        )
    )


def _path_of(node: Mapping) -> str:
    """As mmengine's ``BaseDataset`` joins it."""
    root, path = node.get('data_root'), node['ann_file']
    return osp.join(root, path) if root and isinstance(root, str) else path


def _require_same_numbers(
    name: str, path: str, copy: str, used: Sequence[str], read: Mapping[str, AnnotationFile]
) -> None:
    """Refuse an evaluator's file whose images have other new numbers than those of the data set."""
    copied, *others = (
        {image['id']: image['file_name'] for image in read[path].data['images']}
        for path in (copy, *used)
    )
    named = {number: file for other in others for number, file in other.items()}
    differ = any(named.get(number, file) != file for number, file in copied.items())
    if differ and any(read[path].renumbered for path in (copy, *used)):
        raise UsageError(
            f"{name}: '{path}' is not the annotation file of the data set, and the ids of its "
            'images are '
            'no numbers by which the two could be compared: name the same file, or give the images '
            'whole '
            'numbers as ids'
        )

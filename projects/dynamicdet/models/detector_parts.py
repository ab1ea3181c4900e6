"""Where a detector is cut: the parts that are computed on tensors alone, between mmdet's own
Python.

A part takes tensors and gives tensors. `DetectorPart.place` puts another computation in its place,
for good: an ONNX graph, or the same in 8 bits. What lies between, such as proposals, decoding, NMS
and who goes on to the next exit, stays as it is and notices nothing; RoIAlign is replaced in
`deploy.roi_align`.

    first, second, ...        the backbones; the first with the router, if it sees maps alone
    branch0, branch1, ...     neck and dense head (two-stage: RPN) of an exit; of a transformer the
                              neck alone
    branch0.bbox_head0, ...   heads on RoIs, and what they share
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdet.models.detectors import BaseDetector
from mmdet.models.detectors.base_detr import DetectionTransformer

from ..errors import UsageError
from . import DynamicDetector
from .composite import CompositeBackbone

#: Tensors -> any nesting of lists and tuples of tensors.
Run = Callable[..., Any]


@dataclass(frozen=True)
class DetectorPart:
    """A part of a detector.

    Attributes:
        name (str): As above.
        run (Callable): Tensors -> nested tensors, as the detector was built.
        place (Callable): Takes what is to be run instead.
        modules (tuple[nn.Module]): All that it computes with.
        spared (tuple[nn.Module]): What of it is never quantized.
        predicts (bool): Whether what it gives are predictions, such as scores and boxes.
    """

    name: str
    run: Run
    place: Callable[[Run], None]
    modules: tuple[nn.Module, ...]
    spared: tuple[nn.Module, ...] = ()
    predicts: bool = False


class Features(tuple):
    """Maps, with what the same part computed from them: a head's outputs or difficulties."""

    outputs: Any = None

    @classmethod
    def of(cls, maps: Sequence[Tensor], outputs: Any) -> 'Features':
        """Maps with what the same part computed from them."""
        features = cls(maps)
        features.outputs = outputs
        return features


def find_parts(model: BaseDetector) -> list[DetectorPart]:
    """The parts of a detector, in the order in which an image reaches them.

    Raises:
        UsageError: If it is no single- or two-stage detector and no transformer.
    """
    if not isinstance(model, DynamicDetector):
        return [_plain_backbone(model), *_branch('branch0', model)]
    parts = [_first(model), *_deeper(model)]
    for number, branch in enumerate(model.branches):
        parts += _branch(f'branch{number}', branch)
    return parts


def _plain_backbone(model: BaseDetector) -> DetectorPart:
    backbone = getattr(model, 'backbone', None)
    if backbone is None:
        raise UsageError(
            f'{type(model).__name__} cannot be cut into graphs: only single- and two-stage '
            'detectors, plain or dynamic, can'
        )
    forward = backbone.forward

    def place(run: Run) -> None:
        backbone.forward = run

    return DetectorPart('first', lambda images: tuple(forward(images)), place, (backbone,))


def _first(model: DynamicDetector) -> DetectorPart:
    """The first backbone and, for images without padding, the router; the backbone alone where the
    router sees detections or regions are looked at again: that is decided behind exit 0's heads.

    Padding differs from image to image, and is left out by torch.
    """
    backbone, router = model.backbone, model.router
    if model.regions is not None or router.sees_detections:
        return _backbone_alone(backbone)
    first_maps, score = backbone.first_maps, router.forward

    def run(images: Tensor) -> tuple:
        maps = first_maps(images)
        return maps, score(maps)

    def place(run: Run) -> None:
        backbone.first_maps = lambda images: Features.of(*run(images))
        router.forward = forward

    def forward(
        maps: Sequence[Tensor], valid: Sequence[tuple[float, float]] | None = None
    ) -> Tensor:
        whole = valid is None or all(high == wide == 1 for high, wide in valid)
        if whole and isinstance(maps, Features):
            return maps.outputs
        return score(maps, valid)

    # Its cost is nothing, and who goes on depends on it.
    return DetectorPart('first', run, place, (backbone.first, router), (router,))


def _backbone_alone(backbone: CompositeBackbone) -> DetectorPart:
    first_maps = backbone.first_maps

    def place(run: Run) -> None:
        backbone.first_maps = run

    return DetectorPart('first', lambda images: tuple(first_maps(images)), place, (backbone.first,))


def _deeper(model: DynamicDetector) -> list[DetectorPart]:
    backbone = model.backbone
    deeper_maps, reused = backbone.deeper_maps, backbone.reuse_stages
    placed: dict[int, Run] = {}

    def place(index: int, run: Run) -> None:
        placed[index] = run
        backbone.deeper_maps = dispatch

    def dispatch(images: Tensor | None, maps: Sequence[Tensor], index: int = 1) -> tuple:
        if index not in placed:
            return deeper_maps(images, maps, index)
        inputs = (*maps, images) if backbone.needs_images else maps
        # What it takes over it need not give back.
        return (*maps[:reused], *placed[index](*inputs))

    def run(index: int, *inputs: Tensor) -> tuple:
        *maps, images = inputs if backbone.needs_images else (*inputs, None)
        return tuple(deeper_maps(images, tuple(maps), index)[reused:])

    return [
        DetectorPart(
            name,
            lambda *inputs, index=index: run(index, *inputs),
            lambda other, index=index: place(index, other),
            (backbone.nets[index], backbone.connections),
        )
        for index, name in enumerate(backbone.names)
        if index
    ]


def _branch(name: str, branch: BaseDetector) -> list[DetectorPart]:
    """Neck with dense head, and the heads on RoIs; a transformer's neck, if it has one."""
    if isinstance(branch, DetectionTransformer):
        return [_neck(name, branch)] if branch.with_neck else []
    two_stage = getattr(branch, 'roi_head', None) is not None
    head = getattr(branch, 'rpn_head' if two_stage else 'bbox_head', None)
    if head is None or not hasattr(head, 'predict_by_feat'):
        raise UsageError(
            f'{type(branch).__name__} cannot be cut into graphs: it has no dense head; single- and '
            'two-stage detectors have'
        )
    parts = [_dense(name, branch, head, two_stage)]
    if two_stage:
        for kind in ('shared_head', 'bbox_head', 'mask_head'):
            module = getattr(branch.roi_head, kind, None)
            every = module if isinstance(module, nn.ModuleList) else [module]
            # Cascades may hold one head several times.
            unique = {id(module): module for module in every if module is not None}.values()
            parts += [
                _module(f'{name}.{kind}{index}', module, kind != 'shared_head')
                for index, module in enumerate(unique)
            ]
    return parts


def _neck(name: str, branch: DetectionTransformer) -> DetectorPart:
    neck = branch.neck
    through = neck.forward

    def place(run: Run) -> None:
        neck.forward = lambda maps: run(*maps)

    return DetectorPart(name, lambda *maps: tuple(through(maps)), place, (neck,))


def _dense(name: str, branch: BaseDetector, head: nn.Module, two_stage: bool) -> DetectorPart:
    if getattr(branch, 'neck', None) is None:
        branch.neck = nn.Identity()
    neck = branch.neck
    through, outputs = neck.forward, head.forward

    def run(*maps: Tensor) -> tuple:
        features = through(maps)
        # A single-stage detector looks at nothing but its head's outputs.
        return tuple(features) if two_stage else (), outputs(features)

    def place(other: Run) -> None:
        neck.forward = lambda maps: Features.of(*other(*maps))
        head.forward = lambda features: features.outputs

    # What an RPN gives are proposals, which the heads on RoIs judge anew.
    return DetectorPart(name, run, place, (neck, head), predicts=not two_stage)


def _module(name: str, module: nn.Module, predicts: bool) -> DetectorPart:

    def place(run: Run) -> None:
        module.forward = run

    return DetectorPart(name, module.forward, place, (module,), predicts=predicts)


# Nested tensors, flat, for a graph.

Form = Any


def flatten(value: Any) -> tuple[list[Tensor], Form]:
    """Tensors, each once, and how they are nested: an index, None, or ['list' or 'tuple',
    parts]."""
    tensors: list[Tensor] = []

    def visit(node: Any) -> Form:
        if isinstance(node, Tensor):
            for index, known in enumerate(tensors):
                if known is node:
                    return index
            tensors.append(node)
            return len(tensors) - 1
        if node is None:
            return None
        if isinstance(node, (list, tuple)):
            return ['list' if isinstance(node, list) else 'tuple', [visit(child) for child in node]]
        raise UsageError(
            f'a part gives a {type(node).__name__}, which is no tensor: it cannot be a graph'
        )

    form = visit(value)
    return tensors, form


def unflatten(tensors: Sequence[Tensor], form: Form) -> Any:
    """The opposite of `flatten`."""
    if form is None:
        return None
    if isinstance(form, int):
        return tensors[form]
    parts = [unflatten(tensors, child) for child in form[1]]
    return parts if form[0] == 'list' else tuple(parts)


@torch.no_grad()
def record_inputs(
    parts: Sequence[DetectorPart], drive: Callable[[], None]
) -> dict[str, tuple[Tensor, ...]]:
    """What reaches each part first, while something drives the detector. Parts stay watched."""
    seen: dict[str, tuple[Tensor, ...]] = {}

    def watch(part: DetectorPart) -> None:

        def run(*tensors: Tensor) -> Any:
            seen.setdefault(part.name, tensors)
            return part.run(*tensors)

        part.place(run)

    for part in parts:
        watch(part)
    drive()
    return seen

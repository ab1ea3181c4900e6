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

from torch import Tensor, nn

from mmdet.models.detectors import BaseDetector
from mmdet.models.detectors.base_detr import DetectionTransformer

from ..cascade.parts import DetectorPart, Features, Run, backbone_part, deeper_parts, first_part
from ..errors import UsageError
from . import DynamicDetector


def find_parts(model: BaseDetector) -> list[DetectorPart]:
    """The parts of a detector, in the order in which an image reaches them.

    Raises:
        UsageError: If it is no single- or two-stage detector and no transformer.
    """
    if not isinstance(model, DynamicDetector):
        return [_plain_backbone(model), *_branch('branch0', model)]
    parts = [_first(model), *deeper_parts(model)]
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
    """The first backbone with the router; the backbone alone where the router sees detections or
    regions are looked at again: that is decided behind exit 0's heads."""
    if model.regions is not None or model.router.sees_detections:
        return backbone_part(model.backbone)
    return first_part(model)


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

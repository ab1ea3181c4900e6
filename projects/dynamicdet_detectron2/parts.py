"""Where a Detectron2 detector is cut: the parts that are computed on tensors alone; see
`dynamicdet.cascade.parts`.

    first, second, ...    the backbones; the first with the router; of a plain detector with FPN
    branch0.neck          what is above the backbone, such as FPN
    branch0.head          the dense head, two-stage: RPN's
    branch0.box_head0     heads on RoIs, with their predictors; branch0.mask_head, ...
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from dynamicdet.cascade.parts import DetectorPart, Run, deeper_parts, first_part
from dynamicdet.errors import UsageError

from .branch import PassThroughBackbone
from .dynamic_detector import DynamicDetector


def find_parts(model: nn.Module) -> list[DetectorPart]:
    """The parts of a detector, plain or dynamic, in the order in which an image reaches them.

    Raises:
        UsageError: If it has no dense head, as transformers have none.
    """
    if not isinstance(model, DynamicDetector):
        return [_maps_part('first', model.backbone, ()), *_heads('branch0', model)]
    parts = [first_part(model)]
    if len(model.backbone.names) > 1:
        parts += deeper_parts(model)
    for number, branch in enumerate(model.branches):
        if not isinstance(branch.backbone, PassThroughBackbone):
            entering = list(branch.backbone.bottom_up.output_shape())
            parts.append(_maps_part(f'branch{number}.neck', branch.backbone, entering))
        parts += _heads(f'branch{number}', branch)
    return parts


def _maps_part(name: str, backbone: nn.Module, entering: Sequence[str]) -> DetectorPart:
    """What gives maps by name; from maps by name, or from images if ``entering`` is empty."""
    forward, leaving = backbone.forward, list(backbone.output_shape())

    def run(*inputs: Tensor) -> tuple:
        maps = forward(dict(zip(entering, inputs)) if entering else inputs[0])
        return tuple(maps[key] for key in leaving)

    def place(other: Run) -> None:
        backbone.forward = lambda given: dict(
            zip(leaving, other(*([given[key] for key in entering] if entering else [given])))
        )

    return DetectorPart(name, run, place, (backbone,))


def _heads(name: str, branch: nn.Module) -> Iterator[DetectorPart]:
    """The dense head, and what looks at RoIs and at all pixels."""
    proposals = getattr(branch, 'proposal_generator', None)
    dense = getattr(proposals, 'rpn_head', None) or getattr(branch, 'head', None)
    if not isinstance(dense, nn.Module):
        raise UsageError(
            f'{type(branch).__name__} cannot be cut into parts: it has no dense head; RetinaNet, '
            'FCOS and detectors with an RPN have'
        )
    yield _list_part(f'{name}.head', dense, proposals is None)
    segmenting = getattr(branch, 'sem_seg_head', None)
    if segmenting is not None:
        yield _segmenting(f'{name}.sem_seg_head', segmenting)
    roi_heads = getattr(branch, 'roi_heads', None)
    if roi_heads is None:
        return
    if hasattr(roi_heads, 'res5'):
        yield _attribute_part(f'{name}.res5', roi_heads.res5, 'forward', False)
    box_heads, predictors = (
        list(value) if isinstance(value, nn.ModuleList) else [value]
        for value in (getattr(roi_heads, 'box_head', None), roi_heads.box_predictor)
    )
    for number, (head, predictor) in enumerate(zip(box_heads, predictors)):
        yield _box_part(f'{name}.box_head{number}', head, predictor)
    for kind in ('mask_head', 'keypoint_head'):
        head = getattr(roi_heads, kind, None)
        if head is not None:
            yield _attribute_part(f'{name}.{kind}', head, 'layers', True)


def _list_part(name: str, head: nn.Module, predicts: bool) -> DetectorPart:
    forward = head.forward

    def place(other: Run) -> None:
        head.forward = lambda features: other(*features)

    return DetectorPart(name, lambda *maps: forward(list(maps)), place, (head,), predicts=predicts)


def _box_part(name: str, head: nn.Module | None, predictor: nn.Module) -> DetectorPart:
    """A head with its predictor, which is told what it would say."""
    if head is None:
        return _attribute_part(name, predictor, 'forward', True)
    before, after = head.forward, predictor.forward

    def place(other: Run) -> None:
        head.forward = other
        predictor.forward = lambda predictions: predictions

    run = lambda regions: after(before(regions))
    return DetectorPart(name, run, place, (head, predictor), predicts=True)


def _segmenting(name: str, head: nn.Module) -> DetectorPart:
    layers, entering = head.layers, list(head.in_features)

    def place(other: Run) -> None:
        head.layers = lambda features: other(*(features[key] for key in entering))

    run = lambda *maps: layers(dict(zip(entering, maps)))
    return DetectorPart(name, run, place, (head,), predicts=True)


def _attribute_part(name: str, module: nn.Module, method: str, predicts: bool) -> DetectorPart:
    run: Callable = getattr(module, method)
    place = lambda other: setattr(module, method, other)
    return DetectorPart(name, run, place, (module,), predicts=predicts)

"""What neck and dense head gave for a batch, kept for losses of its images: no part runs twice."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import BaseDetector, SingleStageDetector, TwoStageDetector

from ..private_torch import changes_of

#: Part of a branch -> its output for a batch, nested lists and tuples of tensors (N, ...).
Outputs = Mapping[nn.Module, Any]
#: Whether a part gives the same when it is flagged as training, as losses want it.
_SAME: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextlib.contextmanager
def kept_outputs(branch: BaseDetector) -> Iterator[Outputs]:
    """While this is open, outputs of a branch's neck and dense head are kept, the last of each.

    Left out is what would give something else for losses: parts that look at their training flag,
    such as FCOS's head; outputs that are not of one image per row; and, once this is closed, what
    was written into.
    """
    kept: dict[nn.Module, Any] = {}
    versions: dict[nn.Module, list[int]] = {}

    def keep(part: nn.Module, inputs: tuple, outputs: Any) -> None:
        images = {one.shape[0] for one in _tensors(inputs)}
        rows = {one.shape[0] if one.dim() else 0 for one in _tensors(outputs)}
        if len(images) != 1 or rows != images:
            return
        if part not in _SAME:
            _SAME[part] = _is_same_in_training(part, inputs, outputs)
        if _SAME[part]:
            kept[part], versions[part] = outputs, _versions(outputs)

    hooks = [part.register_forward_hook(keep) for part in _parts(branch)]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
        for part in [part for part in kept if _versions(kept[part]) != versions[part]]:
            del kept[part]


@contextlib.contextmanager
def replayed_outputs(outputs: Outputs, image: int) -> Iterator[None]:
    """While this is open, parts give what they gave for one image of the batch, and do not run."""
    before = {part: vars(part).get('forward') for part in outputs}
    for part, part_outputs in outputs.items():
        # On the object, where it hides the method of the class.
        part.forward = _replay(_map(part_outputs, lambda tensor: tensor[image : image + 1]))
    try:
        yield
    finally:
        for part, forward in before.items():
            del part.forward
            if forward is not None:
                part.forward = forward


def _replay(outputs: Any) -> Callable:
    return lambda *_: outputs


def _parts(branch: BaseDetector) -> list[nn.Module]:
    # Heads of other detectors, such as DINO's, see queries, not images.
    known = isinstance(branch, (SingleStageDetector, TwoStageDetector))
    head = getattr(
        branch, 'rpn_head' if isinstance(branch, TwoStageDetector) else 'bbox_head', None
    )
    neck = getattr(branch, 'neck', None)
    return [neck] * (neck is not None) + [head] * (known and isinstance(head, BaseDenseHead))


def _is_same_in_training(part: nn.Module, inputs: tuple, outputs: Any) -> bool:
    before, part.training = part.training, True
    try:
        second = list(_tensors(part.forward(*inputs)))
    finally:
        part.training = before
    first = list(_tensors(outputs))
    return len(first) == len(second) and all(map(torch.equal, first, second))


def _versions(outputs: Any) -> list[int]:
    # Those of inference mode count no changes, and no head of mmdet changes them.
    return [0 if one.is_inference() else changes_of(one) for one in _tensors(outputs)]


def _tensors(node: Any) -> Iterator[Tensor]:
    """All tensors; what is something else counts as one without images."""
    if isinstance(node, (list, tuple)):
        for one in node:
            yield from _tensors(one)
    else:
        yield node if isinstance(node, Tensor) else torch.zeros(())


def _map(node: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(node, Tensor):
        return function(node)
    return type(node)(_map(one, function) for one in node)

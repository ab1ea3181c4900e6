"""What neck and dense head gave for a batch, kept for losses of its images: no part runs twice."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import BaseDetector, SingleStageDetector, TwoStageDetector
from mmdet.utils import InstanceList

from ..private_torch import changes_of

#: What a prior generator is asked for, which depends on the sizes of maps and images alone.
_OF_PRIORS = ('grid_priors', 'valid_flags')
#: Whether a part gives the same when it is flagged as training, as losses want it.
_SAME: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Outputs(dict[nn.Module, Any]):
    """Part of a branch -> its output for a batch, nested lists and tuples of tensors (N, ...).

    Attributes:
        proposals (list[InstanceData]): Of each image, for losses, where an RPN head also has the
            first of them for tests; else empty.
        priors (dict): What prior generators gave for losses, by what they were asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.proposals: InstanceList = []
        self.priors: dict[tuple, tuple[list, list[int]]] = {}


@contextlib.contextmanager
def kept_outputs(branch: BaseDetector) -> Iterator[Outputs]:
    """While this is open, outputs of a branch's neck and dense head are kept, the last of each, and
    proposals.

    Left out is what would give something else for losses: parts that look at their training flag,
    such as FCOS's head; outputs that are not of one image per row; and, once this is closed, what
    was written into.
    """
    kept = Outputs()
    versions: dict[nn.Module, list[int]] = {}

    def keep(part: nn.Module, inputs: tuple, outputs: Any) -> None:
        images = {tensor.shape[0] for tensor in _tensors(inputs)}
        rows = {tensor.shape[0] if tensor.dim() else 0 for tensor in _tensors(outputs)}
        if len(images) != 1 or rows != images:
            return
        if part not in _SAME:
            _SAME[part] = _is_same_in_training(part, inputs, outputs)
        if _SAME[part]:
            kept[part], versions[part] = outputs, _versions(outputs)

    hooks = [part.register_forward_hook(keep) for part in _parts(branch)]
    try:
        with _kept_proposals(branch, kept):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()
        for part in [part for part in kept if _versions(kept[part]) != versions[part]]:
            del kept[part]


@contextlib.contextmanager
def replayed_outputs(outputs: Outputs, image: int) -> Iterator[None]:
    """While this is open, parts give what they gave for one image of the batch, and do not run."""
    with contextlib.ExitStack() as stack:
        for part, part_outputs in outputs.items():
            given = _giving(_map(part_outputs, lambda tensor: tensor[image : image + 1]))
            stack.enter_context(_hidden(part, 'forward', given))
            if outputs.proposals and isinstance(part, RPNHead):
                # New: losses write into what they are given.
                proposals = [outputs.proposals[image].new()]
                stack.enter_context(_hidden(part, 'predict_by_feat', _giving(proposals)))
            generator = getattr(part, 'prior_generator', None)
            for name in _OF_PRIORS if generator is not None else ():
                once = _once(getattr(generator, name), outputs.priors, (part, name))
                stack.enter_context(_hidden(generator, name, once))
        yield


@contextlib.contextmanager
def _hidden(owner: Any, name: str, function: Callable) -> Iterator[None]:
    """A function in the place of a method: on the object, where it hides that of the class."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


@contextlib.contextmanager
def _kept_proposals(branch: BaseDetector, kept: Outputs) -> Iterator[None]:
    """Where losses want more proposals than a test and else the same, an RPN head makes them all at
    once."""
    head = getattr(branch, 'rpn_head', None)
    # Others, such as GA-RPN's, may choose in another way.
    if type(head) is not RPNHead or not isinstance(branch, TwoStageDetector):
        yield
        return
    few, many = branch.test_cfg.rpn, branch.train_cfg.get('rpn_proposal', branch.test_cfg.rpn)
    if few.max_per_img > many.max_per_img or {**few, 'max_per_img': many.max_per_img} != many:
        yield
        return
    predict = head.predict_by_feat

    def first_of_all(*outputs: Any, cfg: Any = None, **arguments: Any) -> InstanceList:
        kept.proposals = predict(*outputs, cfg=many, **arguments)
        return [proposals[: few.max_per_img] for proposals in kept.proposals]

    with _hidden(head, 'predict_by_feat', first_of_all):
        yield


def _once(function: Callable, known: dict, key: tuple) -> Callable:
    """A function that is asked once for the same thing, unless what it gave was written into."""

    def ask(*arguments: Any, **named: Any) -> list:
        asked = (*key, repr((arguments, named)))
        if asked not in known or _versions(known[asked][0]) != known[asked][1]:
            given = function(*arguments, **named)
            known[asked] = given, _versions(given)
        return list(known[asked][0])

    return ask


def _giving(outputs: Any) -> Callable:
    return lambda *_, **__: outputs


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
    return [0 if tensor.is_inference() else changes_of(tensor) for tensor in _tensors(outputs)]


def _tensors(node: Any) -> Iterator[Tensor]:
    """All tensors; what is something else counts as one without images."""
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _tensors(child)
    else:
        yield node if isinstance(node, Tensor) else torch.zeros(())


def _map(node: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(node, Tensor):
        return function(node)
    return type(node)(_map(child, function) for child in node)

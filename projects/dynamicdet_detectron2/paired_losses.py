"""Losses of one image under several exits that differ by the exits alone."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dynamicdet.cascade.resolution import Ratio

from .branch import ExitInputs
from .resolution import scale_boxes

#: Seeds what losses draw (samples of anchors and proposals), the same for every image and exit: any
#: constant does.
_SEED = 0
#: By which dense detectors divide, a running mean over the images that they were asked about.
_NORMALIZER = 'loss_normalizer'


class ExitView(NamedTuple):
    """What one exit sees of one image: its branch, inputs with ready maps, and how large the exit
    sees the image against the delivered one."""

    branch: nn.Module
    inputs: ExitInputs
    ratio: Ratio

    def loss(self) -> dict[str, Tensor]:
        """The branch's own, under the seed of all views."""
        return _seeded(self.inputs.images.device, lambda: self.branch(self.inputs))


def paired_losses(views: Sequence[ExitView]) -> list[dict[str, Tensor]]:
    """Each view's own losses, all under the same random draw.

    Two-stage heads learn from a sample of their own proposals. Exits propose different regions, the
    better one more that cover objects, whose boxes then cost more: compared as they are, such
    losses say that the worse exit is better. So all views' proposals are put together, and every
    head is asked about the same sample of them.
    """
    with contextlib.ExitStack() as stack:
        # What heads count goes into a storage of its own, not into the training's log.
        stack.enter_context(EventStorage(0))
        for branch in {id(view.branch): view.branch for view in views}.values():
            stack.enter_context(_flagged_as_training(branch))
        if all(_is_two_stage(view.branch) for view in views):
            return _on_the_same_proposals(views)
        losses = []
        for view in views:
            with _fresh_normalizer(view.branch):
                losses.append(view.loss())
        return losses


def _is_two_stage(branch: nn.Module) -> bool:
    return (
        getattr(branch, 'roi_heads', None) is not None
        and getattr(branch, 'proposal_generator', None) is not None
    )


@contextlib.contextmanager
def _flagged_as_training(branch: nn.Module) -> Iterator[None]:
    """Meta-architectures, proposal generators and heads give losses where their own flags say
    training. So the flags of all parts do; norms and dropout stay as they are."""
    modules = [
        module for module in branch.modules() if not isinstance(module, (_BatchNorm, _DropoutNd))
    ]
    before = [module.training for module in modules]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module, flag in zip(modules, before):
            module.training = flag


@contextlib.contextmanager
def _fresh_normalizer(branch: nn.Module) -> Iterator[None]:
    """Divide by what the first image of a training would be divided by: the same for all images and
    exits, in any order."""
    kept = vars(branch).pop(_NORMALIZER, None)
    try:
        yield
    finally:
        vars(branch).pop(_NORMALIZER, None)
        if kept is not None:
            setattr(branch, _NORMALIZER, kept)


def _on_the_same_proposals(views: Sequence[ExitView]) -> list[dict[str, Tensor]]:
    pending = []
    for view in views:
        with _captured(view.branch.roi_heads) as calls:
            losses = view.loss()
        pending.append((losses, *calls))
    proposals = [call[2][0] for _, call in pending]
    for view, (losses, (images, features, proposed, targets)) in zip(views, pending):
        together = _together(proposals, views, view.ratio, proposed[0].image_size)
        heads = view.branch.roi_heads
        _, more = _seeded(images.device, lambda: heads(images, features, [together], targets))
        losses.update(more)
    return [losses for losses, _ in pending]


def _together(
    proposals: Sequence[Instances], views: Sequence[ExitView], ratio: Ratio, size: tuple
) -> Instances:
    """All proposals in the frame of one view."""
    boxes = [
        scale_boxes(
            image_proposals.proposal_boxes, (ratio[0] / view.ratio[0], ratio[1] / view.ratio[1])
        ).tensor
        for image_proposals, view in zip(proposals, views)
    ]
    logits = [image_proposals.objectness_logits for image_proposals in proposals]
    return Instances(
        size, proposal_boxes=Boxes(torch.cat(boxes)), objectness_logits=torch.cat(logits)
    )


@contextlib.contextmanager
def _captured(roi_heads: nn.Module) -> Iterator[list]:
    """Put off the second stage: what it is called with is kept, and it is not run."""
    calls = []

    def keep(*arguments):
        calls.append(arguments)
        return [], {}

    # On the object, where it hides the method of the class until it is taken away again.
    roi_heads.forward = keep
    try:
        yield calls
    finally:
        del roi_heads.forward


def _seeded(device: torch.device, run):
    """A call under the same random numbers each time; the generators stay as they were."""
    devices = [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(_SEED)
        for each in devices:
            torch.cuda.default_generators[each.index].manual_seed(_SEED)
        return run()


def padded_labels(inputs: dict, size: tuple[int, int], ignored: int) -> dict:
    """An image's inputs with its map of labels as large as the batch's images: where it is asked
    about alone, its maps are still those of the batch.

    Args:
        inputs (dict): As the exit sees them.
        size (tuple[int, int]): Height and width.
        ignored (int): The label of what does not count.
    """
    if 'sem_seg' not in inputs:
        return inputs
    labels = inputs['sem_seg']
    height, width = labels.shape[-2:]
    padded = F.pad(labels, (0, size[1] - width, 0, size[0] - height), value=ignored)
    return {**inputs, 'sem_seg': padded}

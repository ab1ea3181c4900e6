"""Losses of one image under both exits that differ by the exits alone."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet.models.detectors import BaseDetector, TwoStageDetector
from mmdet.structures import DetDataSample

from ..cascade.resolution import Ratio
from .kept_outputs import Outputs, replayed_outputs
from .resolution import scale_boxes

#: Seeds what losses draw (samples of proposals, DINO's noise), the same for every image and both
#: exits: any constant does.
_SEED = 0


class ExitView(NamedTuple):
    """What one exit sees of one image: its branch, maps of (1, C_i, H_i, W_i), the data sample in
    the exit's frame, and how large that frame is against the delivered one. What neck and dense
    head gave for the batch that it is an image of need not be computed again, see
    `kept_outputs`."""

    branch: BaseDetector
    maps: tuple[Tensor, ...]
    sample: DetDataSample
    ratio: Ratio
    outputs: Outputs = Outputs()
    image: int = 0

    def loss(self) -> dict[str, Tensor]:
        """The branch's own, under the seed of all views."""
        with replayed_outputs(self.outputs, self.image):
            return _seeded(self.branch.loss, self.maps, [self.sample])


def paired_losses(views: list[ExitView]) -> list[dict[str, Tensor]]:
    """Each view's own losses, all under the same random draw.

    Two-stage heads learn from a sample of their own proposals. Exits propose different regions, the
    better one more that cover objects, whose boxes then cost more: compared as they are, such
        losses
    say that the worse exit is better. So all views' proposals are put together, and every head is
    asked about the same sample of them.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_other_ranks())
        for view in views:
            stack.enter_context(_flagged_as_training(view.branch))
        if all(
            isinstance(view.branch, TwoStageDetector) and view.branch.with_rpn for view in views
        ):
            return _on_the_same_proposals(views)
        return [view.loss() for view in views]


@contextlib.contextmanager
def without_other_ranks() -> Iterator[None]:
    """As if there were no other ranks: mmdet's heads average what they divide by over all of them,
    and an image's loss would depend on images elsewhere."""
    # Where torch has no processes, its package has no groups either.
    group = dist.GroupMember if dist.is_available() else None
    if group is None or group.WORLD is None:
        yield
        return
    world, group.WORLD = group.WORLD, None
    try:
        yield
    finally:
        group.WORLD = world


@contextlib.contextmanager
def _flagged_as_training(branch: BaseDetector) -> Iterator[None]:
    """Some detectors and heads have no loss, or another, where their own flag says eval: DINO
    leaves out what its head needs, FCOS with ``norm_on_bbox`` decodes first. So the flags of the
    detector and its parts say training; norms and dropout, further inside, stay as they are."""
    modules = [branch, *branch.children()]
    before = [module.training for module in modules]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module, flag in zip(modules, before):
            module.training = flag


def _on_the_same_proposals(views: list[ExitView]) -> list[dict[str, Tensor]]:
    pending = []
    for view in views:
        with _captured(view.branch.roi_head) as calls:
            losses = view.loss()
        pending.append((losses, *calls))
    proposals = [call[1][0] for _, call in pending]
    for view, (losses, (features, _, samples)) in zip(views, pending):
        together = [_together(proposals, views, view.ratio)]
        losses.update(_seeded(view.branch.roi_head.loss, features, together, samples))
    return [losses for losses, _ in pending]


def _together(proposals: list[InstanceData], views: list[ExitView], ratio: Ratio) -> InstanceData:
    """All proposals in the frame of one view. New: heads write into what they are given."""
    boxes = [
        scale_boxes(instances.bboxes, (ratio[0] / view.ratio[0], ratio[1] / view.ratio[1]))
        for instances, view in zip(proposals, views)
    ]
    return InstanceData(
        bboxes=torch.cat(boxes),
        scores=torch.cat([instances.scores for instances in proposals]),
        labels=torch.cat([instances.labels for instances in proposals]),
    )


@contextlib.contextmanager
def _captured(roi_head) -> Iterator[list]:
    """Put off the second stage: what its ``loss`` is called with is kept, and it is not run."""
    calls = []

    def keep(*arguments):
        calls.append(arguments)
        return {}

    # On the object, where it hides the method of the class until it is taken away again.
    roi_head.loss = keep
    try:
        yield calls
    finally:
        del roi_head.loss


def _seeded(loss, maps: tuple[Tensor, ...], *arguments) -> dict[str, Tensor]:
    """A loss under the same random numbers each time; the generators stay as they were."""
    # Proposals are sampled with the CPU's generator on every device; DINO's noise with the
    # device's.
    devices = [maps[0].device] if maps[0].is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(_SEED)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(_SEED)
        return loss(maps, *arguments)

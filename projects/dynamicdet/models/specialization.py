"""Step 1: let later exits learn most from the images that the first one gets wrong."""

import torch
from torch import Tensor

from mmdet.structures import DetDataSample

from .paired_losses import ExitView, alone


def specialized_losses(
    first: ExitView, later: list[ExitView], power: float
) -> list[dict[str, Tensor]]:
    """Losses of later exits in which images count by what the first exit gets wrong.

    Boosting in spirit: ``w_i = (n_i * L1_i) ** power``, divided by its mean over the batch, where
        ``L1_i``
    is the first exit's loss of image i, without gradient, and ``n_i`` its number of objects, at
    least 1: mmdet's heads average over objects, AP counts them. The first exit's own loss is not
        touched.

    Args:
        first (ExitView): The first exit: branch, maps (N, C_i, H_i, W_i), a list of N data samples.
        later (list[ExitView]): The others.
        power (float): From 0 (all images count the same) on.

    Returns:
        list[dict]: Losses of each later exit: the weighted mean of those of its images, each taken
        alone, since heads average over what they are given.
    """
    with alone():
        wrong = [_wrong(first, index) for index in range(len(first.sample))]
        weights = torch.stack(wrong) ** power
        weights = weights / weights.sum()
        return [_weighted(view, weights) for view in later]


def _wrong(view: ExitView, index: int) -> Tensor:
    """``n_i * L1_i``."""
    sample = view.sample[index]
    with torch.no_grad():
        losses = view.branch.loss(tuple(m[index : index + 1] for m in view.maps), [_copy(sample)])
        total, _ = view.branch.parse_losses(losses)
    return total.detach() * max(1, len(sample.gt_instances))


def _weighted(view: ExitView, weights: Tensor) -> dict[str, Tensor]:
    summed: dict[str, Tensor] = {}
    for index, weight in enumerate(weights):
        own = view.branch.loss(tuple(m[index : index + 1] for m in view.maps), [view.sample[index]])
        for name, value in own.items():
            # Losses of several levels come as lists; `parse_losses` adds them up.
            value = (
                sum(part.mean() for part in value)
                if isinstance(value, (list, tuple))
                else value.mean()
            )
            summed[name] = summed.get(name, 0) + weight * value
    return summed


def _copy(sample: DetDataSample) -> DetDataSample:
    """Heads write into what they are given (RTMDet-Ins its masks)."""
    copied = sample.new()
    copied.gt_instances = sample.gt_instances.new()
    return copied

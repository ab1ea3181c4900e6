"""What the router is trained on: per-image losses of both detectors -> one number.

Letters, as in the paper (DynamicDet, arXiv 2304.05552, section 3.3): ``L1``, ``L2``: the losses of
the first and second detector on one image, without gradient; ``phi``: difficulty; ``delta``: median of
``L1 - L2`` over the training set.
"""
from typing import Sequence

import torch
from torch import Tensor

#: Name -> what an image's loss is multiplied by, given its number of objects n.
#:
#: * ``mean``: 1, the paper's. mmdet's heads divide an image's loss by its positives or by a fixed
#:   number of samples, so an image with one object counts as much as one with ten.
#: * ``objects``: n, which turns the average back into a sum over objects, as AP counts them. An
#:   image without objects then has nothing to gain from the second detector. The differences are
#:   skewed, their mean above their median: without standardised features (`Router`) that can push
#:   all difficulties to 1 before the router tells images apart.
WEIGHTINGS = {
    'mean': lambda objects: torch.ones_like(objects),
    'objects': lambda objects: objects,
}


def weigh(losses: Tensor, objects: Sequence[int], weighting: str) -> Tensor:
    """Weigh per-image losses.

    Args:
        losses (Tensor): (N,) or (..., N), as the heads average them.
        objects (Sequence[int]): Number of annotated objects of each of the N images.
        weighting (str): A key of `WEIGHTINGS`.

    Returns:
        Tensor: Weighted losses, shape of ``losses``.
    """
    return losses * WEIGHTINGS[weighting](losses.new_tensor(objects))


def router_loss(difficulty: Tensor, first: Tensor, second: Tensor, delta: Tensor) -> Tensor:
    """The router's objective, averaged over images (DynamicDet, equation 12).

    ``(1 - phi) * (L1 - delta / 2) + phi * (L2 + delta / 2)``; its gradient in phi is
    ``L2 - L1 + delta``, so half of the training images are pushed each way.

    Args:
        difficulty (Tensor): (N,), in [0, 1], with gradient.
        first (Tensor): ``L1``, (N,).
        second (Tensor): ``L2``, (N,).
        delta (Tensor): Scalar.

    Returns:
        Tensor: Scalar.
    """
    first, second = first.detach(), second.detach()
    easy = (1 - difficulty) * (first - delta / 2)
    hard = difficulty * (second + delta / 2)
    return (easy + hard).mean()

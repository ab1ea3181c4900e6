"""Fit a region router to records: what each cell really gained, by what exit 0 said of it.

Letters: n images. ``h``, ``w``: rows and columns of an image's grid of cells, see `regions`. An
image of a few hundred cells is a few hundred examples.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .region_maps import RegionRouter

#: Updates, each on all images, and AdamW's settings.
_STEPS, _RATE, _DECAY = 300, 0.01, 0.1
#: Of the ridge regression, times the cells: what is standardized has a square of 1 for each.
_PENALTY = 1e-3
#: Gains beyond this quantile of those that are not 0 count as that: a squared error would
#: otherwise be about a few objects of rare classes.
_TAIL = 0.95


def fit_region_router(
    router: RegionRouter,
    inputs: Sequence[Tensor],
    gains: Sequence[np.ndarray],
    seed: int = 0,
    steps: int = _STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Fit a router's convolutions, in place: least squares of the gain of each cell.

    Args:
        router (RegionRouter): Its weights start afresh.
        inputs (Sequence[Tensor]): What it sees of each image, n times (width, h, w), see
            `RegionRouter.inputs`.
        gains (Sequence[np.ndarray]): n times (h, w), see `region_record.cell_gains`.
        seed (int): Of the weights where there are hidden channels. Defaults to 0.
        steps (int): Updates, where there are hidden channels. Defaults to 300.
        progress (Callable, optional): Called with updates done and all.

    Returns:
        float: Rank correlation, in [-1, 1], of what it says of the images' sums with their gains,
        on the images that it was fitted to.

    Raises:
        UsageError: If there are no images, or nothing is to be gained.
    """
    if not len(inputs) or not any(gain_map.any() for gain_map in gains):
        raise UsageError('no cell of the record gains anything: there is nothing to fit regions to')
    x, y, mask = _padded(inputs, gains)
    bound = float(torch.quantile(y[y != 0].abs(), _TAIL))
    y = y.clamp(-bound, bound)
    inside = mask.bool()[:, None].expand_as(x)
    flat = x.movedim(1, 0)[inside.movedim(1, 0)].reshape(x.shape[1], -1)
    device = router.mean.device
    with torch.no_grad():
        router.mean.copy_(flat.mean(1))
        router.std.copy_(flat.std(1).clamp(min=1e-6))
    x, y, mask = (tensor.to(device) for tensor in (x, y, mask))
    if len(router.layers) == 1:
        _solve(router, flat, y[mask.bool()])
    else:
        _descend(router, x, y, mask, seed, steps, progress)
    router.trained.fill_(True)
    with torch.no_grad():
        said = (router.gains(x) * mask).sum((1, 2)).cpu().numpy()
    from scipy.stats import spearmanr

    correlation = float(spearmanr(said, [gain_map.sum() for gain_map in gains]).statistic)
    return correlation if np.isfinite(correlation) else 0.0


@torch.no_grad()
def _solve(router: RegionRouter, inputs: Tensor, gains: Tensor) -> None:
    """Ridge regression of the gains, (cells,), on what cells hold, (width, cells)."""
    mean, std = router.mean[:, None], router.std[:, None]
    x = ((inputs.to(mean) - mean) / std).double()
    y = gains.double()
    # Where a plane is empty in all images, its weight is 0.
    square = x @ x.T + _PENALTY * x.shape[1] * torch.eye(len(x), dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(square, x @ (y - y.mean()))
    router.layers[0].weight.copy_(weight.reshape(1, -1, 1, 1))
    router.layers[0].bias.fill_(y.mean())
    for parameter in router.parameters():
        parameter.requires_grad_(False)


def _descend(
    router: RegionRouter,
    x: Tensor,
    y: Tensor,
    mask: Tensor,
    seed: int,
    steps: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """The same by gradients, from weights that a seed says."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for layer in router.layers:
            if hasattr(layer, 'reset_parameters'):
                layer.reset_parameters()
        parameters = [parameter.requires_grad_() for parameter in router.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            error = ((router.gains(x) - y).square() * mask).sum() / mask.sum()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
            if progress:
                progress(step + 1, steps)
        for parameter in parameters:
            parameter.requires_grad_(False)


def _padded(inputs: Sequence[Tensor], gains: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Images of all grids as one batch, their gains, and where they are."""
    height, width = (max(sides) for sides in zip(*(gain_map.shape for gain_map in gains)))
    x = torch.zeros(len(inputs), inputs[0].shape[0], height, width)
    y, mask = torch.zeros(2, len(inputs), height, width)
    for row, (planes, gain) in enumerate(zip(inputs, gains)):
        high, wide = gain.shape
        x[row, :, :high, :wide] = planes
        y[row, :high, :wide] = torch.from_numpy(gain)
        mask[row, :high, :wide] = 1
    return x, y, mask

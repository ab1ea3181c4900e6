"""Step 2 on tensors: what the router learns from gains, and what is measured of a training set."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..routing import class_weights, quantiles_of
from ..routing.objective import Objective


class RouterLearning:
    """The router's loss, and the gains that it is measured by. A part of a dynamic detector that
    has a ``router`` and a ``delta``."""

    def _init_router_learning(self, objective: Objective) -> None:
        self.objective = objective
        # Quantiles of the training set's gains, (101,); NaN until they are measured. The hook of
        # step 2 keeps them in checkpoints: they matter to that step alone.
        self.register_buffer('gains', torch.full((101,), float('nan')), persistent=False)
        # Objects of each class in the training set, for gains by class; as the quantiles.
        self.register_buffer('class_counts', torch.zeros(0), persistent=False)

    def weighted_gains(self, parts: Tensor) -> Tensor:
        """Gains by class, (N,), of what `class_gains` gives, (N, C + 1), by the objects of each
        class that are known so far (``class_counts``); by none, all weigh the same."""
        classes = parts.shape[1] - 1
        counts = F.pad(self.class_counts, (0, max(0, classes - len(self.class_counts))))
        weights = parts.new_tensor(class_weights(counts.tolist())[:classes])
        return parts[:, :-1] @ weights + parts[:, -1]

    def router_losses(self, gains: Tensor, features: Tensor) -> dict[str, Tensor]:
        """What step 2 minimizes, ``loss_router``, with mean and spread of the difficulty, the share
        above 0.5, and delta, for the log.

        Args:
            gains (Tensor): Of a batch, (N,).
            features (Tensor): What the router sees of it, (N, d).
        """
        quantiles = (
            quantiles_of(gains.tolist()).to(gains.device)
            if self.gains.isnan().any()
            else self.gains
        )
        logits = self.router.logits(features)
        phi = logits.detach().sigmoid()
        return dict(
            loss_router=self.objective.loss(logits, gains, quantiles),
            difficulty=phi.mean(),
            difficulty_std=phi.std(correction=0),
            share_above_half=(phi > 0.5).float().mean(),
            delta=quantiles[len(quantiles) // 2],
        )


def set_gains(model, gains: Sequence[float]) -> None:
    """Tell a dynamic detector the gains of its training set, (n,): their quantiles, and delta."""
    quantiles = quantiles_of(gains)
    model.gains.copy_(quantiles)
    model.delta.fill_(quantiles[len(quantiles) // 2])


def add_class_counts(model, counts: Sequence[float]) -> None:
    """Tell a dynamic detector of more objects, by label; labels beyond those it knew are new."""
    width = max(len(counts), len(model.class_counts))
    seen = model.class_counts.new_tensor(counts)
    model.class_counts = sum(
        F.pad(tally, (0, width - len(tally))) for tally in (model.class_counts, seen)
    )


class TrainingSetMeasure:
    """Gains of the images of a training set, and mean and spread of what the router sees of them,
    batch by batch: one pass, bounded memory.

    Args:
        by_class (bool): Whether gains come class by class, to be weighted once all objects are
            counted.
    """

    def __init__(self, by_class: bool = False) -> None:
        self.by_class = by_class
        self._measured: dict[Hashable, tuple] = {}
        # Count, sum and sum of squares, in double precision.
        self._moments = [0, 0.0, 0.0]

    def __len__(self) -> int:
        return len(self._measured)

    def add(
        self,
        keys: Sequence[Hashable],
        gains: Tensor,
        features: Tensor,
        counts: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            keys (Sequence): Of each image, with the path as its last part.
            gains (Tensor): (N,); by class, their parts, (N, C + 1).
            features (Tensor): What the router sees, (N, d).
            counts (Tensor, optional): By class: objects, (N, C).
        """
        parts = gains if self.by_class else gains[:, None]
        counts = gains.new_zeros(len(gains), 0) if counts is None else counts
        self._measured.update(zip(keys, zip(parts.tolist(), counts.tolist())))
        features = features.double().cpu()
        self._moments = [
            self._moments[0] + len(features),
            self._moments[1] + features.sum(0),
            self._moments[2] + features.square().sum(0),
        ]

    def result(
        self, model, gather: Callable[[object], list]
    ) -> tuple[dict[Hashable, float], Tensor, Tensor]:
        """Gains by key, and mean and standard deviation of what the router sees, (d,) each; the
        same on all ranks.

        Args:
            model: The dynamic detector, which is told how many objects of each class there are.
            gather (Callable): Gives the objects of all ranks for that of this one.

        Raises:
            UsageError: If there is no image, or a gain is not finite.
        """
        every: dict[Hashable, tuple] = {}
        ranks = gather((self._measured, self._moments))
        for part, _ in ranks:
            every.update(part)
        gains = self._weighted(model, every)
        bad = [key[-1] for key, value in gains.items() if not np.isfinite(value)]
        if bad or not gains:
            reason = (
                f'the losses of image(s) {bad[:5]} are not finite' if bad else 'there is no image'
            )
            raise UsageError(f'delta cannot be measured: {reason}')
        count, total, squares = (sum(part[index] for _, part in ranks) for index in range(3))
        mean = total / count
        # A channel that is the same for all images says nothing, and must not be divided by 0.
        std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6)
        return gains, mean, std

    def _weighted(self, model, every: dict[Hashable, tuple]) -> dict[Hashable, float]:
        """Gains of images from their parts, once the objects of all images are counted."""
        if not self.by_class:
            return {key: parts[0] for key, (parts, _) in every.items()}
        model.class_counts = model.class_counts.new_zeros(0)
        for _, counts in every.values():
            add_class_counts(model, counts)
        return {
            key: float(model.weighted_gains(model.gains.new_tensor([parts])))
            for key, (parts, _) in every.items()
        }

"""Whether a frame shows anything at all, told from its early map: an exit for *no detection*.

Letters: N images, C channels of the early map, P parts of its summary (`streams.GRID` squared), d =
C * P.
"""

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet.registry import MODELS

from ..errors import UsageError
from ..precision import KeepsType
from .streams import GRID


@MODELS.register_module()
class Presence(KeepsType, BaseModule):
    """Chance that a frame shows an object, from the summary of its early map.

    Each part's means, and what they are above the means of the whole scene, both standardized, go
    through two linear layers to a logit. The frame's is the largest of its parts': it shows an
    object if one part does (multiple-instance learning, Dietterich et al. 1997).

    It is fitted to a record (`gate_fitting.fit_presence`), never with the detector: its parameters
    ask for no gradient. Until then it holds every frame for one with objects.

    Args:
        in_channels (int): C.
        width (int): Between the two layers. Defaults to 16.
        init_cfg (dict, optional): As in mmengine. Defaults to None.

    Attributes:
        level (Tensor): Buffer, in [0, 1]: a frame whose chance is at most that shows nothing; -1
            until fitted.
    """

    def __init__(self, in_channels: int, width: int = 16, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if in_channels < 1 or width < 1:
            raise UsageError(
                f'Presence takes channels and a width from 1 on, got {in_channels} and {width}'
            )
        self.in_channels = in_channels
        self.register_buffer('mean', torch.zeros(2 * in_channels, 1))
        self.register_buffer('std', torch.ones(2 * in_channels, 1))
        self.register_buffer('level', torch.tensor(-1.0))
        self.hidden = nn.Linear(2 * in_channels, width)
        self.output = nn.Linear(width, 1)
        self.requires_grad_(False)

    def reset(self) -> None:
        """Forget all that was learned; the weights are drawn anew."""
        self.mean.zero_()
        self.std.fill_(1)
        self.level.fill_(-1)
        self.hidden.reset_parameters()
        self.output.reset_parameters()

    def standardize(self, early: Tensor) -> None:
        """Let the moments be those of some frames' parts; ``early``: (N, d)."""
        parts = self._parts(early).double()
        self.mean.copy_(parts.mean(dim=(0, 2))[:, None])
        # What is the same everywhere says nothing, and must not be divided by 0.
        self.std.copy_(parts.std(dim=(0, 2), correction=0).clamp(min=1e-6)[:, None])

    def logits(self, early: Tensor) -> Tensor:
        """(N,), from summaries, (N, d). Computed in float32 whatever the detector is in."""
        with torch.autocast(early.device.type, enabled=False):
            parts = (self._parts(early) - self.mean) / self.std
            return self.output(self.hidden(parts.transpose(1, 2)).relu()).squeeze(2).amax(dim=1)

    def forward(self, early: Tensor) -> Tensor:
        """Chances, (N,), in [0, 1], from summaries, (N, d)."""
        return self.logits(early).sigmoid()

    def _parts(self, early: Tensor) -> Tensor:
        """(N, d) to (N, 2 C, P)."""
        if early.shape[1] != self.in_channels * GRID**2:
            raise UsageError(
                f'Presence is for an early map of {self.in_channels} channels, and this one has '
                f'{early.shape[1] // GRID**2}: set its in_channels'
            )
        parts = early.float().unflatten(1, (self.in_channels, -1))
        return torch.cat([parts, parts - parts.mean(dim=2, keepdim=True)], dim=1)

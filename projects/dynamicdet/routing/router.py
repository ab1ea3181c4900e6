"""The router: feature maps -> difficulty."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..precision import KeepsType
from .detection_features import WIDTH as DETECTION_FEATURES

#: Name -> what is kept of each channel of a map: a function of (M, C, H, W) that gives (M, C),
#: float32.
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    'mean': lambda values: values.mean(dim=(2, 3), dtype=torch.float32),
    'max': lambda values: values.amax(dim=(2, 3)).float(),
    # Not by the mean of squares, which loses digits. Of a single cell it is 0.
    'std': lambda values: values.float().var(dim=(2, 3), correction=0).sqrt(),
}


class Router(KeepsType):
    """Predict how much an image needs the second detector (DynamicDet, equations 6 to 8).

    Global average pooling of each map, concatenated to a vector of width d; ``fc d -> floor(d/4)``,
    ReLU, ``fc -> 1``, sigmoid. The released code's score is one minus this.

    ``mean`` and ``std``, (d,), standardize the vector. At 0 and 1, as they start, this is the
    paper's router; `RouterHook` sets them to the training set's. Pooled maps are all positive, and
    what is common to all images would otherwise move every difficulty together, to 0 or 1, before
    the router tells images apart.

    It stays in float32 whatever type the detector is turned into.

    It sees the first backbone's maps alone by default. What exit 0 detects tells it more, but is
    not free: exit 0's neck and heads then run on every image, as they do where exits are merged.

    Args:
        in_channels (Sequence[int]): Channels of the maps; d is their sum, times the number of
            pools.
        reduction (int): d over the hidden width. Defaults to 4, the paper's.
        pools (Sequence[str]): What is kept of each channel of each map over the image: 'mean',
            'max', 'std' (spread). Defaults to the mean alone, the paper's. The vector has all means
            first, then all of the next.
        sees (str): 'maps', 'detections' of exit 0 (`detection_features`), or 'both'; the vector has
            the maps first. Defaults to 'maps'. Others are fitted to records alone.
        classes (int): Where it sees detections: how many there are. Defaults to 0.

    Attributes:
        class_weights (Tensor): Where it sees detections: of each label, (classes,); see
            `class_weights`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        reduction: int = 4,
        pools: Sequence[str] = ('mean',),
        sees: str = 'maps',
        classes: int = 0,
    ) -> None:
        super().__init__()
        # One pool on a command line is no list.
        pools = (pools,) if isinstance(pools, str) else tuple(pools)
        unknown = [name for name in pools if name not in POOLS]
        if unknown or not pools:
            raise UsageError(f"a router's pools are some of {', '.join(POOLS)}; got {list(pools)}")
        if sees not in ('maps', 'detections', 'both'):
            raise UsageError(f"a router sees 'maps', 'detections' or 'both'; got '{sees}'")
        self.pools, self.sees = pools, sees
        width = 0 if sees == 'detections' else sum(in_channels) * len(self.pools)
        if self.sees_detections:
            width += DETECTION_FEATURES
            self.register_buffer('class_weights', torch.ones(classes))
        self.register_buffer('mean', torch.zeros(width))
        self.register_buffer('std', torch.ones(width))
        self.fc1 = nn.Linear(width, width // reduction)
        self.fc2 = nn.Linear(width // reduction, 1)

    @property
    def sees_detections(self) -> bool:
        """Whether exit 0's neck and heads have to run before it."""
        return self.sees != 'maps'

    def forward(
        self,
        maps: Sequence[Tensor],
        valid: Sequence[tuple[float, float]] | None = None,
        detections: Tensor | None = None,
    ) -> Tensor:
        """Score a batch.

        Args:
            maps (Sequence[Tensor]): The first backbone's maps, (N, C_i, H_i, W_i).
            valid (Sequence[tuple], optional): For each image the shares of height and width that
                are image and not padding, in (0, 1]. Padding is left out of all pools, or an
                image's difficulty would depend on what it is batched with; what remains is what
                padding does to the maps near it. Defaults to all.
            detections (Tensor, optional): `detection_features.features`, (N, w), where it sees
                detections. Defaults to none.

        Returns:
            Tensor: Difficulty, (N,), float32 in [0, 1], large is hard.
        """
        if not self.sees_detections:
            return self.score(self.pool(maps, valid))
        if detections is None:
            raise UsageError(
                "this router sees exit 0's detections: it runs in predict, not in mode='tensor'"
            )
        seen = [self.pool(maps, valid)] if self.sees == 'both' else []
        return self.score(torch.cat([*seen, detections], dim=1))

    def score(self, features: Tensor) -> Tensor:
        """Difficulty, (N,), of pooled features, (N, d), as `pool` gives them."""
        return self.logits(features).sigmoid()

    def logits(self, features: Tensor) -> Tensor:
        """What the sigmoid makes difficulties of, (N,), float32, of pooled features, (N, d)."""
        # In float32 also under AMP: half precision has too few values near 1 to rank images by.
        with torch.autocast(features.device.type, enabled=False):
            features = (features - self.mean) / self.std
            hidden = F.linear(features, self.fc1.weight, self.fc1.bias).relu()
            return F.linear(hidden, self.fc2.weight, self.fc2.bias).squeeze(1)

    def pool(
        self, maps: Sequence[Tensor], valid: Sequence[tuple[float, float]] | None = None
    ) -> Tensor:
        """What the router sees, (N, d), float32: each pool of each map over the image. Arguments as
        `forward`'s."""
        maps = [_images(m, valid) for m in maps]
        return torch.cat(
            [_pooled(parts, POOLS[name]) for name in self.pools for parts in maps], dim=1
        )


def _images(values: Tensor, valid: Sequence[tuple[float, float]] | None) -> list[Tensor]:
    """The valid part of each image's map, (1, C, h, w), or the map of all of them where all is
    valid."""
    if valid is None or all(high == wide == 1 for high, wide in valid):
        return [values]
    height, width = values.shape[-2:]
    return [
        image_map[None, :, : _cells(high, height), : _cells(wide, width)]
        for image_map, (high, wide) in zip(values, valid)
    ]


def _cells(share: float, count: int) -> int:
    """How many of so many cells see a share of an image, in (0, 1]. The share is a rounded one, and
    no further cell is seen for its last digits: of pixels it is a whole number."""
    return math.ceil(round(share * count, 6))


def _pooled(parts: Sequence[Tensor], pool: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, C)."""
    return torch.cat([pool(part) for part in parts])

"""What the frame before knew, for this one. Letters: N images, C channels, H x W cells of a head, S
x S of memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet.models.layers import SinePositionalEncoding
from mmdet.registry import MODELS

from ..errors import UsageError
from .streams import Memory, VideoStream

#: By eye: a mix that starts as a ninth of memory, so that heads trained without it work from the
#: first step.
_START = -2.0


@MODELS.register_module()
class Propagation(BaseModule):
    """Features of a head, helped by those of the frame before (Gay 2022):

        f_align = attention(queries: f_t; keys and values: the frame before's f_final, resized to S
        x S) w = sigmoid(conv([f_align, f_t]))
        f_final = w * f_align + (1 - w) * f_t

    and f_final is carried on to the next frame. Queries, keys, values and w are 1x1 convolutions;
    attention has one head (scaled dot product, arXiv 1706.03762, equation 1). The seed says that it
    has about 90 thousand parameters and not how it resizes: here by means over 2S x 2S parts and a
        2x2 convolution that
    begins as their mean.

    Args:
        channels (int): C. Defaults to 100.
        size (int): S. Defaults to 20, the seed's; for images smaller than 640 pixels take less.
        positional (bool): Whether queries and keys are told where they are, by sines of their
            relative place (arXiv 2005.12872, appendix A.4). Defaults to False.
        gaps (int): Above 0: queries and w are told how many frames ago the memory is from, 1 to
            this many or more. Defaults to 0, not told.
        truncate (int): Gradients pass through no more than so many frames, this one included.
            Defaults to 4.
        init_cfg (dict, optional): As in mmengine. Defaults to None.
    """

    def __init__(
        self,
        channels: int = 100,
        size: int = 20,
        positional: bool = False,
        gaps: int = 0,
        truncate: int = 4,
        init_cfg: dict = None,
    ) -> None:
        super().__init__(init_cfg)
        if size < 1 or gaps < 0 or truncate < 1 or positional and channels % 4:
            raise UsageError(
                'propagation takes size and truncate from 1 on, gaps from 0 on, and, if '
                f'positional, channels that 4 divides; got {size}, {truncate}, {gaps} and '
                f'{channels}'
            )
        self.size, self.gaps, self.truncate = size, gaps, truncate
        self.resize = nn.Conv2d(channels, channels, 2, stride=2)
        self.query, self.key, self.value = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.weigh = nn.Conv2d(2 * channels, channels, 1)
        self.places = SinePositionalEncoding(channels // 2, normalize=True) if positional else None
        self.gap = nn.Embedding(gaps, 2 * channels) if gaps else None
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Begin with values that are features of the frame before, and few of them."""
        each = torch.arange(len(self.value.weight))
        for layer, share in ((self.resize, 1 / 4), (self.value, 1)):
            layer.weight.zero_()
            layer.weight[each, each] = share
            layer.bias.zero_()
        self.weigh.bias.fill_(_START)
        if self.gap is not None:
            self.gap.weight.zero_()

    def remember(self, features: Tensor) -> Tensor:
        """What is kept of f_final, (N, C, H, W): (N, C, 2S, 2S), however large the image."""
        return F.adaptive_avg_pool2d(features, 2 * self.size)

    def forward(self, features: Tensor, memory: Tensor, gap: Tensor) -> Tensor:
        """Mix.

        Args:
            features (Tensor): f_t, (N, C, H, W).
            memory (Tensor): From `remember`, (N, C, 2S, 2S).
            gap (Tensor): Frames since then, (N,), integers from 1 on.

        Returns:
            Tensor: f_final, (N, C, H, W).
        """
        tokens = self.resize(memory)
        query, key, bias = features, tokens, 0
        if self.places is not None:
            query, key = query + self._where(query), key + self._where(key)
        if self.gap is not None:
            modulation = self.gap(gap.clamp(1, self.gaps) - 1)[:, :, None, None]
            shift, bias = modulation.chunk(2, dim=1)
            query = query + shift
        attended = F.scaled_dot_product_attention(
            *map(_as_tokens, (self.query(query), self.key(key), self.value(tokens)))
        )  # (N, HW, C)
        aligned = attended.transpose(1, 2).unflatten(2, features.shape[2:])
        share = (self.weigh(torch.cat([aligned, features], dim=1)) + bias).sigmoid()
        return share * aligned + (1 - share) * features

    def _where(self, x: Tensor) -> Tensor:
        return self.places(x.new_zeros(1, *x.shape[2:], dtype=torch.bool)).to(x)


def _as_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, HW, C)."""
    return x.flatten(2).transpose(1, 2)


def carry_on(
    mix: Propagation, exit: int, features: Tensor, streams: Sequence[VideoStream]
) -> Tensor:
    """Mix a head's features with what its streams remember, and let them remember the result.

    Streams that remember nothing leave their features as they are.

    Args:
        mix (Propagation): The head's.
        exit (int): The head's number.
        features (Tensor): (N, C, H, W).
        streams (Sequence[VideoStream]): Of the N frames, which are their latest.

    Returns:
        Tensor: f_final, (N, C, H, W).
    """
    known = [place for place, stream in enumerate(streams) if exit in stream.memories]
    if known:
        remembering = [streams[place] for place in known]
        # One copy to the device for both.
        index, gaps = torch.tensor(
            [known, [stream.frame - stream.memories[exit].frame for stream in remembering]],
            device=features.device,
        )
        every = len(known) == len(features)
        mixed = mix(
            features if every else features[index],
            torch.stack([stream.memories[exit].map for stream in remembering]),
            gaps,
        )
        features = (
            mixed.to(features) if every else features.index_copy(0, index, mixed.to(features))
        )
    for stream, kept in zip(streams, mix.remember(features)):
        depth = stream.memories[exit].depth + 1 if exit in stream.memories else 1
        if depth >= mix.truncate:
            kept, depth = kept.detach(), 0
        stream.memories[exit] = Memory(kept, stream.frame, depth)
    return features

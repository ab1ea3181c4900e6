"""Where a Swin Transformer's stages are."""

from collections.abc import Sequence

from torch import Tensor, nn

from mmdet.models.backbones import SwinTransformer

from .composite import CompositeBackbone, biased_projection, register_family


def swin_projection(in_channels: int, out_channels: int) -> nn.Module:
    """``w[l, i]``, CBNetV2's for Swin: none where channels are equal, which is where i = l; else a
    1x1 convolution with a bias, which starts at zero."""
    if in_channels == out_channels:
        return nn.Identity()
    return biased_projection(in_channels, out_channels)


@register_family(SwinTransformer)
class CompositeSwin(CompositeBackbone):
    """Stem: patch embedding, stride 4. Stages: ``stages``; the patch merging at a stage's end makes
    what enters the next one. ``f1[i]`` are the normed maps.

    The second backbone takes over nothing (``reuse_stages=0``). In CBNetV2 it takes over the first
    one's patch embedding; here it has its own copy, which costs 0.1 % of the whole.

    Between stages values are maps, (N, C, H, W), as for all families; within, mmdet's sequences of
    tokens, (N, H * W, C).
    """

    projection = staticmethod(swin_projection)
    # A stage's map is the normed one, and the next stage wants it before norm, after patch merging.
    can_reuse = False

    def stage_indices(self, backbone: dict) -> tuple[Sequence[int], Sequence[int]]:
        """The config's ``out_indices``, and all stages."""
        stages = tuple(range(len(backbone.get('depths', (2, 2, 6, 2)))))
        return tuple(backbone.get('out_indices', (0, 1, 2, 3))), stages

    def stage_channels(self, net: nn.Module) -> tuple[list[int], list[int]]:
        """Channels that enter each stage, and that leave it."""
        # Patch merging doubles channels, so each stage gives as many as enter it.
        return net.num_features, net.num_features

    def stem(self, net: nn.Module, images: Tensor) -> Tensor:
        """Images, (N, 3, H, W), to embedded patches, as a map."""
        tokens, size = net.patch_embed(images)
        if net.use_abs_pos_embed:
            tokens = tokens + net.absolute_pos_embed
        return _to_map(net.drop_after_pos(tokens), size)

    def stage(self, net: nn.Module, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stage's normed map, and the merged patches that enter the next stage."""
        tokens = x.flatten(2).transpose(1, 2)
        entering, entering_size, leaving, size = net.stages[index](tokens, tuple(x.shape[-2:]))
        output = _to_map(getattr(net, f'norm{index}')(leaving), size).contiguous()
        return output, _to_map(entering, entering_size)


def _to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H * W, C) -> (N, C, H, W), a view."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))

"""Where a ResNet's stages are: ResNet, ResNetV1d, ResNeXt, Res2Net, SE-ResNet of any depth."""

from collections.abc import Sequence

from torch import Tensor, nn

from mmdet.models.backbones import ResNet

from .composite import CompositeBackbone, register_family


@register_family(ResNet)
class CompositeResNet(CompositeBackbone):
    """Stem: convolutions and max pooling, stride 4. Stages: ``layer1`` to ``layer4``."""

    def stage_indices(self, backbone: dict) -> tuple[Sequence[int], Sequence[int]]:
        """The config's ``out_indices``, and all stages."""
        stages = backbone.get('num_stages', 4)
        return tuple(backbone.get('out_indices', range(stages))), tuple(range(stages))

    def stage_channels(self, net: nn.Module) -> tuple[list[int], list[int]]:
        """Channels that enter each stage, and that leave it."""
        leaving = [
            net.base_channels * 2**index * net.block.expansion for index in range(net.num_stages)
        ]
        return [net.stem_channels] + leaving[:-1], leaving

    def drop_leading(self, net: nn.Module, count: int) -> None:
        """Replace the stem and ``count`` stages by identities."""
        stem = ['stem'] if net.deep_stem else ['conv1', net.norm1_name, 'relu']
        for name in stem + ['maxpool'] + net.res_layers[:count]:
            setattr(net, name, nn.Identity())

    def stem(self, net: nn.Module, images: Tensor) -> Tensor:
        """Images, (N, 3, H, W), to a map of stride 4."""
        x = net.stem(images) if net.deep_stem else net.relu(net.norm1(net.conv1(images)))
        return net.maxpool(x)

    def stage(self, net: nn.Module, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stage's map, which also enters the next stage."""
        x = getattr(net, net.res_layers[index])(x)
        return x, x

"""A branch: a stock meta-architecture that is handed ready feature maps instead of pixels."""

from collections.abc import Callable, Mapping, Sequence

from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from dynamicdet.errors import UsageError

#: Names of what a pyramid calls the backbone below it: FPN, SimpleFeaturePyramid.
_BELOW = ('bottom_up', 'net')


class PassThroughBackbone(Backbone):
    """Gives back what it is given. Stands in the place of a bottom-up backbone, with its shapes.

    Args:
        bottom_up (Backbone): What it stands for. Not kept.
    """

    def __init__(self, bottom_up: Backbone) -> None:
        super().__init__()
        self._shapes = dict(bottom_up.output_shape())
        self._divisibility = bottom_up.size_divisibility
        # Detectron2 0.6 knows none.
        self._constraints = dict(getattr(bottom_up, 'padding_constraints', {}))

    def forward(self, maps: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The maps that it is given, as they are."""
        return maps

    def output_shape(self) -> dict:
        """Shapes of the maps, by name."""
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        """What sides of images are padded to multiples of; 0 for none."""
        return self._divisibility

    @property
    def padding_constraints(self) -> dict:
        """What else padding has to obey."""
        return self._constraints


class ExitImages(ImageList):
    """Feature maps in the place of pixels.

    Args:
        maps (Mapping): By name, (N, C_i, H_i, W_i).
        image_sizes (Sequence[tuple]): Height and width of each image without padding, in the frame
            that the exit sees; no whole numbers where that is a reduced one.
    """

    def __init__(
        self, maps: Mapping[str, Tensor], image_sizes: Sequence[tuple[float, float]]
    ) -> None:
        super().__init__(maps, list(image_sizes))

    @property
    def device(self):
        """Where the maps are."""
        return next(iter(self.tensor.values())).device


class ExitInputs(list):
    """A batch as an exit sees it: what Detectron2's models are called with, a dict of each image,
    and ready maps.

    Args:
        inputs (Sequence[dict]): Of each image, in the exit's frame.
        images (ExitImages): The maps.
    """

    def __init__(self, inputs: Sequence[dict], images: ExitImages) -> None:
        super().__init__(inputs)
        self.images = images


def _images_of(inputs: ExitInputs) -> ExitImages:
    """In the place of ``preprocess_image``."""
    return inputs.images


def split_detector(build: Callable[[], nn.Module]) -> tuple[nn.Module, Backbone, str]:
    """Build a stock detector, and take its bottom-up backbone out.

    Args:
        build (Callable): Builds the detector.

    Returns:
        tuple: The branch, which takes `ExitInputs`; the backbone; and what names of the backbone's
            entries begin with in the stock detector's checkpoints, such as ``backbone.bottom_up.``.

    Raises:
        UsageError: If the detector sees images in another way than through its ``backbone``, or
            needs Detectron2's extension where there is none.
    """
    try:
        detector = build()
    except ImportError as error:
        raise UsageError(
            f"this detector needs Detectron2's extension, as deformable stages do: {error}"
        ) from None
    name = type(detector).__name__
    backbone = getattr(detector, 'backbone', None)
    if not isinstance(backbone, Backbone) or not hasattr(type(detector), 'preprocess_image'):
        raise UsageError(
            f'{name} cannot be made dynamic: a meta-architecture must see images through its '
            'backbone, after preprocess_image, as GeneralizedRCNN, RetinaNet, FCOS and PanopticFPN '
            'do; name such a one in MODEL.DYNAMIC.META_ARCHITECTURE'
        )
    owner, attribute, prefix = detector, 'backbone', 'backbone.'
    for below in _BELOW:
        if isinstance(getattr(backbone, below, None), nn.Module):
            owner, attribute, prefix = backbone, below, f'backbone.{below}.'
    bottom_up = getattr(owner, attribute)
    setattr(owner, attribute, PassThroughBackbone(bottom_up))
    # On the object, where it hides the method of the class; `stock_images` calls that.
    detector.preprocess_image = _images_of
    return detector, bottom_up, prefix


def stock_images(branch: nn.Module, inputs: Sequence[dict]) -> ImageList:
    """A batch, normalized and padded as the stock detector does it: (N, 3, H, W)."""
    return type(branch).preprocess_image(branch, inputs)


def require_runnable(model: nn.Module, training: bool = False) -> None:
    """Raise a `UsageError` if a detector has deformable stages that its device cannot run: on a CPU
    Detectron2 computes those without modulation, and never their gradients."""
    on_cpu = next(model.parameters()).device.type == 'cpu'
    for module in model.modules() if on_cpu else ():
        kind = type(module).__name__
        plain = kind == 'DeformConv' and module.deformable_groups == 1
        if kind in ('DeformConv', 'ModulatedDeformConv') and (training or not plain):
            what = 'are trained' if training else 'with modulation or several groups run'
            raise UsageError(
                f'deformable stages {what} on GPUs alone, with Detectron2 built with its extension '
                '(MODEL.RESNETS.DEFORM_ON_PER_STAGE)'
            )

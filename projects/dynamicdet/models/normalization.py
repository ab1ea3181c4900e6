"""From one detector's normalized images to another's."""

from collections.abc import Sequence

from mmengine.model import ImgDataPreprocessor
from torch import Tensor, nn

from ..errors import UsageError
from ..private_mmengine import normalizes, swaps_channels


class NormalizationChange(nn.Module):
    """Turns images that one detector's preprocessor normalized into those of another's: mean,
    spread, order of the colors, and the value that padding has.

    Equal to what the other makes of the pixels, bit by bit where the first does not normalize, and
    to rounding elsewhere. Nothing is stored in checkpoints.

    Args:
        before, after (nn.Module): Data preprocessors, as mmdet builds them.

    Raises:
        UsageError: If one is of a kind whose settings are not known.
    """

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        for preprocessor in (before, after):
            if not isinstance(preprocessor, ImgDataPreprocessor):
                raise UsageError(
                    f'images cannot pass from one detector to another by a '
                    f'{type(preprocessor).__name__}: each needs a DetDataPreprocessor'
                )
        for name, preprocessor in (('before', before), ('after', after)):
            mean, std = (
                (preprocessor.mean, preprocessor.std) if normalizes(preprocessor) else (None, None)
            )
            self.register_buffer(f'{name}_mean', mean, persistent=False)
            self.register_buffer(f'{name}_std', std, persistent=False)
        self.swaps = swaps_channels(before) != swaps_channels(after)
        self.padding = float(after.pad_value)
        settings = [_settings(preprocessor) for preprocessor in (before, after)]
        #: Whether there is nothing to change.
        self.changes = settings[0] != settings[1]

    def forward(self, images: Tensor, shapes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Change a batch.

        Args:
            images (Tensor): (N, 3, H, W), normalized as the first wants them. Left as they are.
            shapes (Sequence[tuple], optional): Height and width of each image without what the
                batch is padded with. Defaults to whole images.

        Returns:
            Tensor: (N, 3, H, W): a new one, or the images themselves where nothing changes.
        """
        if not self.changes:
            return images
        if self.before_mean is not None:
            images = images * self.before_std + self.before_mean
        if self.swaps:
            images = images.flip(1)
        if self.after_mean is not None:
            images = (images - self.after_mean) / self.after_std
        return self._padded(images, shapes)

    def _padded(self, images: Tensor, shapes: Sequence[tuple[int, int]] | None) -> Tensor:
        whole = tuple(images.shape[-2:])
        if shapes is None or all(tuple(shape[:2]) == whole for shape in shapes):
            return images
        images = images.clone()
        for image, (height, width, *_) in zip(images, shapes):
            image[:, height:] = self.padding
            image[:, :, width:] = self.padding
        return images


def _settings(preprocessor: ImgDataPreprocessor) -> tuple:
    normal = (
        (preprocessor.mean.tolist(), preprocessor.std.tolist())
        if normalizes(preprocessor)
        else None
    )
    return normal, swaps_channels(preprocessor), float(preprocessor.pad_value)

"""Between a device and the host: what would make one wait for the other, done once for a batch, or
once at all."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .private_torch import changes_of

if TYPE_CHECKING:
    from mmengine.structures import InstanceData


def take_rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """``values[rows]``, a copy. An index that is a list would be copied to the device, and waited
    for."""
    return torch.cat([values[row : row + 1] for row in rows]) if len(rows) else values[:0]


class HostDetections(NamedTuple):
    """Detections of an image on the CPU: boxes, (D, 4), and scores, (D,), float32; labels, (D,),
    int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def to_host(instances: Sequence['InstanceData']) -> list[HostDetections]:
    """Boxes, scores and labels of some images, by one copy from the device; masks stay where they
    are."""
    # Labels are whole numbers, which float32 holds up to 2^24.
    packed = [
        torch.cat(
            [
                getattr(image_instances.bboxes, 'tensor', image_instances.bboxes)
                .detach()
                .float()
                .reshape(-1, 4),
                image_instances.scores.detach().float()[:, None],
                image_instances.labels.detach().float()[:, None],
            ],
            dim=1,
        )
        for image_instances in instances
    ]
    whole = torch.cat(packed).cpu() if packed else torch.zeros(0, 6)
    return [
        HostDetections(rows[:, :4], rows[:, 4], rows[:, 5].long())
        for rows in whole.split([len(part) for part in packed])
    ]


class Followed:
    """A function of a tensor that is computed anew only when the tensor has changed.

    Args:
        function (Callable): Of a tensor, such as ``Tensor.tolist``.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self._function = function
        self._seen: tuple[Tensor, int, Any] | None = None

    def __call__(self, tensor: Tensor) -> Any:
        """The function of a tensor, computed anew if the tensor has changed since."""
        # Those of inference mode count no changes.
        if tensor.is_inference():
            return self._function(tensor)
        seen = self._seen
        if seen is None or seen[0] is not tensor or seen[1] != changes_of(tensor):
            self._seen = seen = tensor, changes_of(tensor), self._function(tensor)
        return seen[2]

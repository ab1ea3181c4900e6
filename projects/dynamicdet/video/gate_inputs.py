"""What an early-exit detector shows its gates, and what it shows of all its exits.

Letters: N images, E exits (the E - 1 auxiliary heads, then the detector's own output), C_l channels
of the layer below head l.
"""

from typing import NamedTuple

from mmengine.structures import InstanceData
from torch import Tensor


class Evidence(NamedTuple):
    """What a gate may look at, of N images that have not left yet.

    Attributes:
        exit (int): That is being decided about, 0 to E - 2; -1 before the first one, after the
            early layer.
        detections (list[InstanceData], optional): Of this exit, one per image: ``bboxes``,
            ``scores``, ``labels``, in the frame of the network's input. None if the gate did not
            ask, and at exit -1.
        earlier (list[InstanceData], optional): Of the exit before this one, of the same frame. None
            at exit 0 and -1, or if the gate did not ask.
        pooled (list[Tensor]): (N, C_l), means over height and width of the maps of all layers run
            so far that carry a head, this exit's last. Empty at exit -1.
        change (Tensor, optional): (N,), in [0, 1]: of the early map against that of the frame at
            which the stream's detections were last computed; 1 where there is no such frame. None
            at exits from 0 on, or if the gate does not decide early.
    """

    exit: int
    detections: list[InstanceData] | None
    earlier: list[InstanceData] | None
    pooled: list[Tensor]
    change: Tensor | None


class AllExits(NamedTuple):
    """All exits of N images: ``EarlyExitDetector.predict_all``.

    Attributes:
        detections (list[list[InstanceData]]): By exit, 0 to E - 1, then by image.
        pooled (list[Tensor]): (N, C_l), of the E - 1 heads' maps: what `Evidence.pooled` grows to.
        early (Tensor): (N, d), summary of the early map; `streams.early_change` of two of them is a
            change.
        change (Tensor): (N,), in [0, 1], against the stream's frame before (every frame is computed
            here); 1 where there is none.
    """

    detections: list[list[InstanceData]]
    pooled: list[Tensor]
    early: Tensor
    change: Tensor

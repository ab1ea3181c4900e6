"""Checkpoints of several plain detectors under one name, for all who read by mmengine."""

from mmengine.runner import CheckpointLoader

from ..cascade.weights import JOINED, join_checkpoints


@CheckpointLoader.register_scheme(prefixes=JOINED)
def load_from_exits(filename: str, map_location: str | None = None, **_) -> dict:
    """Let all who read checkpoints take those of several plain detectors, ``exits://A,B``, as
    that of a pair: tools, ``load_from``, ``init_cfg``."""
    names = filename.removeprefix(JOINED).split(',')
    return join_checkpoints(
        [CheckpointLoader.load_checkpoint(name, map_location=map_location) for name in names]
    )

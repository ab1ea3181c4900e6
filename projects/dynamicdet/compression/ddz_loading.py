"""mmengine reads ``.ddz`` files wherever it reads checkpoints: ``load_from``, ``init_cfg``,
`init_detector`."""

from typing import Any

import torch
from mmengine.fileio import get
from mmengine.runner import CheckpointLoader

from .ddz import read_compressed


# mmengine tries its patterns from the last to the first in the alphabet: ours for URLs comes before
# its own.
@CheckpointLoader.register_scheme(prefixes=[r'.*\.ddz$', r'https?://.*\.ddz$'], force=True)
def load_from_ddz(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A checkpoint from a path or URL; see `read_compressed`."""
    checkpoint = read_compressed(filename, get)
    if isinstance(map_location, (str, torch.device)):
        state = checkpoint['state_dict']
        for key, value in state.items():
            state[key] = value.to(map_location)
    return checkpoint

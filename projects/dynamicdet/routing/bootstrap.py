"""Bootstrap over images: 95 % intervals of what was measured on them (Efron 1979).

An image that is drawn twice counts twice. Letters: B resamples, n images.
"""

from collections.abc import Sequence

import numpy as np

#: Resamples of the images: the ends of a 95 % interval then rest on five of them each.
RESAMPLES = 200


def bootstrap_weights(images: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each image is drawn, (B, n): n draws with replacement, B times.

    The same arguments give the same draws, so that what is compared is compared on the same images.
    """
    return np.random.default_rng(seed).multinomial(
        images, np.full(images, 1 / images), size=resamples
    )


def confidence_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval of resampled values, NaN left out; None without any."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return None, None
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)

"""Which images the routing page shows: the easiest, the hardest, and those routed the wrong way."""

from collections.abc import Mapping

import numpy as np
from pycocotools.coco import COCO

from ..routing.curve import difficulties_of, split
from ..routing.evaluation import Mixtures
from ..routing.record import RoutingRecord
from .analysis_pictures import file_name, picture_groups, picture_pair

#: Images of each kind.
_COUNT = 4


def choose_images(
    difficulties: np.ndarray, image_ap: np.ndarray, count: int = _COUNT
) -> Mapping[str, list[int]]:
    """Images to look at, by what the router says of them and what the exits find.

    Args:
        difficulties (np.ndarray): (n,), in [0, 1].
        image_ap (np.ndarray): AP of each image by itself under the cheap and the dear exit, (2, n),
            percent.
        count (int): Of each kind, at most. Defaults to 4.

    Returns:
        dict: ``easiest`` and ``hardest``; ``wrongly_easy``: those that lose most by leaving early
            where half of the images are hard, and ``wrongly_hard``: those that lose most by going
            on. Indices, the most extreme first; only images that lose something are wrongly routed.
    """
    _, is_hard = split(difficulties, 0.5)
    order = np.argsort(difficulties, kind='stable')
    gain = image_ap[1] - image_ap[0]
    losses = dict(wrongly_easy=np.where(is_hard, 0, gain), wrongly_hard=np.where(is_hard, -gain, 0))
    shown = min(count, max(1, len(order) // 2))
    chosen = dict(easiest=order[:shown].tolist(), hardest=order[::-1][:shown].tolist())
    for name, lost in losses.items():
        worst = np.argsort(-lost, kind='stable')[:count]
        chosen[name] = [int(index) for index in worst if lost[index] > 0]
    return chosen


_GROUPS = dict(
    easiest=('The easiest', 'Lowest difficulty: they leave at the cheap exit first.'),
    hardest=('The hardest', 'Highest difficulty: they go on to the dear exit first.'),
    wrongly_easy=(
        'Wrongly easy',
        'With half of the images hard, these leave at the cheap exit, and the dear one would have '
        'found most more.',
    ),
    wrongly_hard=(
        'Wrongly hard',
        'With half of the images hard, these go on to the dear exit, which finds less than the '
        'cheap one.',
    ),
)


def make_gallery(record: RoutingRecord, coco: COCO) -> str:
    """The gallery of a record of two exits, as HTML.

    Args:
        record (RoutingRecord): See `routing.record`.
        coco (COCO): Its ground truth.
    """
    image_ap = Mixtures(record, coco).image_ap()
    names = {category['id']: category['name'] for category in coco.cats.values()}
    chosen = choose_images(difficulties_of(record), image_ap)
    numbers = str(record.provenance.get('exits', '0 and 1')).split(' and ')
    groups = []
    for kind, indices in chosen.items():
        pictures = [
            _picture(record[int(index)], image_ap[:, index], coco, names, numbers, f'{kind}{place}')
            for place, index in enumerate(indices)
        ]
        groups.append((*_GROUPS[kind], pictures))
    return picture_groups(groups)


def _picture(
    image: Mapping,
    aps: np.ndarray,
    coco: COCO,
    names: Mapping[int, str],
    numbers: list[str],
    name: str,
) -> str:
    objects = [
        one['bbox'] for one in coco.loadAnns(coco.getAnnIds(imgIds=[image['id']], iscrowd=False))
    ]
    caption = (
        f'{file_name(image)}: difficulty {image["difficulty"]:.3f}; AP of this image {aps[0]:.0f} '
        f'by exit {numbers[0]}, {aps[1]:.0f} by exit {numbers[1]}'
    )
    return picture_pair(image, numbers, objects, names, name, caption)

"""A part of the training images that step 1 does not see, for step 2 to learn on.

Detectors memorize their training images, on which the later exit then looks better than it is; what
a router should know is which *new* images it serves.
"""

import hashlib
from collections.abc import Iterable, Sequence

from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from mmdet.registry import DATASETS

from ..errors import UsageError

PARTS = ('cascade', 'router')


@DATASETS.register_module(name='HoldOut')
def hold_out(
    dataset: dict, share: float = 0.1, part: str = 'cascade', seed: int = 0
) -> BaseDataset:
    """One of two parts of a data set, which have no image in common and together have all.

    Hashes of the images' ids and the seed decide: of all n images of the annotation file, the
    ``round(share * n)`` of the smallest hashes are held out. Both parts stay what they are under
    another order, filter or subset, and on any machine. What a filter leaves out is missing from
    its part: then the share is met about.

    In the config of step 1::

        train_dataloader = dict(dataset=dict(_delete_=True, type='HoldOut', dataset=..., share=0.1))

    and in the one of step 2, which inherits it::

        train_dataloader = dict(dataset=dict(part='router'))

    A data set that mixes or repeats others takes it inside.

    Args:
        dataset (dict): Config of a data set of mmengine's `BaseDataset`, such as ``CocoDataset``.
        share (float): How much of it is held out for the router, in (0, 1). Defaults to 0.1.
        part (str): 'cascade', what step 1 trains on, or 'router', what is held out. Defaults to
            'cascade'.
        seed (int): Another one gives other parts. Defaults to 0.

    Returns:
        BaseDataset: The data set itself with the part's images alone: with its class, metainfo and
            pipeline.

    Raises:
        UsageError: If an argument is out of range, or a part would be empty.
    """
    if part not in PARTS or not 0 < share < 1:
        raise UsageError(
            f"HoldOut takes a share in (0, 1) and part 'cascade' or 'router'; got {share} and "
            f"'{part}'"
        )
    whole = DATASETS.build(dataset)
    if not isinstance(whole, BaseDataset):
        raise UsageError(
            'HoldOut takes a plain data set such as CocoDataset; put it inside '
            f'{type(whole).__name__}, not around it'
        )
    whole.full_init()
    ids = _ids(whole.get_data_info(index) for index in range(len(whole)))
    # Of the whole file: a filter may have left out some, and a subset most.
    cut = _cut(_ids(whole.load_data_list()), share, seed)
    rows = [
        index for index, image in enumerate(ids) if (_draw(image, seed) < cut) == (part == 'router')
    ]
    if not 0 < len(rows) < len(ids):
        raise UsageError(
            f'a share of {share} of {len(ids)} images leaves a part without any: take another '
            'share (router_holdout) or seed'
        )
    whole.get_subset_(rows)
    kept = len(rows) if part == 'router' else len(ids) - len(rows)
    print_log(
        f'router_holdout {share:g}: {kept} of {len(ids)} training images are kept for the router '
        f'(step 2), {len(ids) - kept} are for the cascade (step 1); these are those for the {part}',
        'current',
    )
    return whole


def _ids(images: Iterable[dict]) -> list:
    """Of images, or of videos, which have no such id: their numbers."""
    return [image.get('img_id', index) for index, image in enumerate(images)]


def _cut(ids: Sequence[object], share: float, seed: int) -> float:
    """What the draws of the router's images lie below."""
    draws = sorted(_draw(image, seed) for image in ids)
    return [*draws, 1.0][round(share * len(ids))]


def _draw(image: object, seed: int) -> float:
    """A number in [0, 1) that looks random, the same for the same image and seed everywhere."""
    digest = hashlib.sha256(f'{seed}/{image}'.encode()).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64

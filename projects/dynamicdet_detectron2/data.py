"""Loaders over each image once, and the built-in data set under Detectron2's names."""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import load_coco_json
from detectron2.data.samplers import InferenceSampler
from torch.utils.data import DataLoader

from dynamicdet.errors import UsageError

#: Of the 3,000 training images the last so many are kept for step 2: a router learns little from
#: images that the detectors have memorized.
_ROUTER_IMAGES = 600


def _as_it_is(batch: list) -> list:
    return batch


def every_image(
    images: Sequence[dict], mapper: Callable, batch_size: int = 1, num_workers: int = 0
) -> DataLoader:
    """This rank's part of some images, each once, in order.

    Args:
        images (Sequence[dict]): As a data set in DatasetCatalog gives them.
        mapper (Callable): Of an image, such as `DatasetMapper`.
        batch_size (int), num_workers (int): Of the loader.
    """
    dataset = MapDataset(DatasetFromList(list(images), copy=False), mapper)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=InferenceSampler(len(dataset)),
        num_workers=num_workers,
        collate_fn=_as_it_is,
    )


def every_training_image(cfg) -> Iterable:
    """The training images of a yaml config, each once, as the training sees them."""
    images = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    mapper = DatasetMapper(cfg, is_train=True)
    return every_image(images, mapper, batch_size=8, num_workers=cfg.DATALOADER.NUM_WORKERS)


def every_test_image(cfg, name: str, annotated: bool = False) -> DataLoader:
    """The images of a data set as a test of a yaml config sees them, one at a time.

    Args:
        cfg (CfgNode): The config.
        name (str): Of the data set.
        annotated (bool): Whether their annotations come with them, in the frame of the resized
            image. Defaults to False.
    """
    mapper = DatasetMapper(cfg, is_train=False)
    if annotated:
        mapper = AnnotatedMapper(mapper, DatasetMapper(_unchanged(cfg), is_train=True))
    images = get_detection_dataset_dicts(name, filter_empty=False)
    return every_image(images, mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)


class AnnotatedMapper:
    """Images as a test sees them, with annotations as a training does.

    Args:
        test, train (Callable): Mappers that resize images alike.
    """

    def __init__(self, test: Callable, train: Callable) -> None:
        self.test, self.train = test, train

    def __call__(self, image: dict) -> dict:
        """Read an image."""
        seen = self.test(copy.deepcopy(image))
        annotated = self.train(copy.deepcopy(image))
        return {**annotated, **seen}


def _unchanged(cfg):
    """A config whose training sees images as its test does."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,)
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    cfg.INPUT.RANDOM_FLIP = 'none'
    cfg.INPUT.CROP.ENABLED = False
    return cfg


# The built-in data.


def register_digits(root: str = 'data/digits') -> None:
    """Register the built-in data set, which tools/make_digits.py makes: ``digits_train``,
    ``digits_router`` (for step 2), ``digits_val`` and ``digits_test``. Registered names stay.

    Args:
        root (str): Its folder. Defaults to 'data/digits'.
    """
    for name, split, rows in (
        ('digits_train', 'train', slice(None, -_ROUTER_IMAGES)),
        ('digits_router', 'train', slice(-_ROUTER_IMAGES, None)),
        ('digits_val', 'val', slice(None)),
        ('digits_test', 'test', slice(None)),
    ):
        if name in DatasetCatalog.list():
            continue
        annotations = Path(root) / 'annotations' / f'instances_{split}.json'
        folder = Path(root) / split
        DatasetCatalog.register(name, _reader(str(annotations), str(folder), name, rows))
        MetadataCatalog.get(name).set(
            json_file=str(annotations),
            image_root=str(folder),
            evaluator_type='coco',
            thing_classes=list('0123456789'),
        )


def _reader(annotations: str, folder: str, name: str, rows: slice) -> Callable:
    def read() -> list[dict]:
        if not Path(annotations).is_file():
            raise UsageError(
                f"the built-in data set is not at '{annotations}': make it by tools/make_digits.py"
            )
        return load_coco_json(annotations, folder, name)[rows]

    return read

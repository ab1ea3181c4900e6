"""Ground truth and records for the tests of routing: by hand, and at random with errors of all
kinds."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO

from conftest import rebuilt
from dynamicdet.routing.record import RoutingRecord

BOX = [10, 10, 20, 20]
#: The category of what is made by hand.
CATEGORY = 7


def build_coco(ids, annotations, categories=(CATEGORY,)):
    """COCO of images and annotations (without ids and areas)."""
    coco = COCO()
    coco.dataset = dict(
        info={},
        images=[
            dict(id=identity, file_name=f'{identity}.jpg', width=200, height=200)
            for identity in ids
        ],
        categories=[dict(id=category, name=f'thing {category}') for category in categories],
        annotations=[
            dict(iscrowd=0, area=own['bbox'][2] * own['bbox'][3], id=index) | own
            for index, own in enumerate(annotations, 1)
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def ground_truth(boxes):
    """COCO of one category; ``boxes`` holds a list of boxes per image, ids from 1."""
    return build_coco(
        range(1, len(boxes) + 1),
        [
            dict(image_id=image, bbox=box, category_id=CATEGORY)
            for image, own in enumerate(boxes, 1)
            for box in own
        ],
    )


def found(*boxes, score=0.9):
    return [dict(bbox=list(box), score=score, category_id=CATEGORY) for box in boxes]


def make_record(difficulties, *exits):
    """Record of images 1, 2, ...; ``exits``: detections per image of each exit."""
    images = [
        dict(id=index, file=f'{index}.jpg', difficulty=difficulty, detections=list(own))
        for index, (difficulty, *own) in enumerate(zip(difficulties, *exits), 1)
    ]
    return RoutingRecord.from_images(
        images,
        gflops=[1.0 + 2 * exit for exit in range(len(exits))],
        latencies=[0.010 * (1 + exit) for exit in range(len(exits))],
        provenance={},
    )


def random_case(images=30, seed=0, exits=2, categories=3, crowds=True, ties=True, others=4):
    """Objects of several sizes, some of them crowds, and a record whose later exits are closer, of
    images with ids in no order. One category has no objects. With ``ties``, scores are few and many
    are equal, though not in one image."""
    generator = np.random.default_rng(seed)
    ids = (generator.permutation(3 * images)[:images] + 1).tolist()

    def box():
        return [*generator.uniform(0, 60, 2), *generator.uniform(8, 130, 2)]

    def detect(objects, noise):
        moved = [
            (np.add(own, generator.normal(0, noise, 4)).clip(1).tolist(), category)
            for own, category in objects
            if generator.uniform() < 0.8
        ]
        false = [
            (box(), int(generator.integers(1, categories + 2)))
            for _ in range(generator.integers(0, others))
        ]
        steps = max(20, len(moved) + len(false)) if ties else 10**6
        scores = generator.choice(steps, len(moved) + len(false), replace=False) / steps
        return [
            dict(bbox=own, score=float(score), category_id=category)
            for (own, category), score in zip(moved + false, scores)
        ]

    annotations, entries = [], []
    for identity in ids:
        objects = [
            (box(), int(generator.integers(1, categories + 1)))
            for _ in range(generator.integers(0, 5))
        ]
        annotations += [
            dict(
                image_id=identity,
                bbox=own,
                category_id=category,
                iscrowd=int(crowds and generator.uniform() < 0.15),
            )
            for own, category in objects
        ]
        entries.append(
            dict(
                id=identity,
                file=f'{identity}.jpg',
                difficulty=generator.uniform(),
                detections=[detect(objects, 6 / (1 + exit)) for exit in range(exits)],
            )
        )
    record = rebuilt(make_record([0.5], *[[[]]] * exits), entries)
    return build_coco(ids, annotations, range(1, categories + 2)), record

"""Records of video runs made by hand or at random, and a tiny early-exit detector on tiny
videos."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO

#: Summaries of early maps: 2 channels of 64 parts.
EARLY = 128
CATEGORY = 3
BOX = [10.0, 10.0, 20.0, 20.0]


def detection(box=BOX, score=0.9, category=CATEGORY):
    return dict(bbox=list(box), score=score, category_id=category)


def early_of(level):
    """A summary whose change against another level's is |a - b| / (a + b)."""
    return np.full(EARLY, level, np.float32)


def make_video_record(videos, exits=3, channels=(4, 5)):
    """A record from videos: lists of frames, each ``(level of the early map, detections by exit)``.
    Ids from 1."""
    generator, images = np.random.default_rng(0), []
    for video, frames in enumerate(videos):
        for frame, (level, detections) in enumerate(frames):
            last = frames[frame - 1][0] if frame else None
            images.append(
                dict(
                    id=len(images) + 1,
                    file=f'{video}/{frame}.jpg',
                    video=video,
                    frame=frame,
                    pooled=[generator.normal(size=width).astype(np.float32) for width in channels],
                    early=early_of(level),
                    change=1.0 if last is None else abs(level - last) / (level + last),
                    detections=[list(own) for own in detections],
                )
            )
    return dict(
        images=images,
        gflops=[2.0, 4.0, 10.0],
        latencies=[0.02, 0.04, 0.1],
        costs=dict(
            gflops=dict(early=1.0, looked=[2.0, 5.0, 13.0]),
            latencies=dict(early=0.01, looked=[0.02, 0.05, 0.13]),
        ),
        provenance=dict(ann_file='a.json'),
    )


def truth(record, boxes):
    """COCO with these boxes, by image of the record."""
    coco = COCO()
    annotations = [
        dict(
            image_id=image['id'],
            bbox=list(box),
            category_id=CATEGORY,
            iscrowd=0,
            area=box[2] * box[3],
        )
        for image, own in zip(record['images'], boxes)
        for box in own
    ]
    coco.dataset = dict(
        images=[dict(id=image['id'], width=100, height=100) for image in record['images']],
        categories=[dict(id=CATEGORY, name='thing')],
        annotations=[dict(one, id=index) for index, one in enumerate(annotations, 1)],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def random_case(videos=4, length=10, seed=0):
    """Frames in which a box moves or not; later exits find it better, the first one the better the
    brighter (``pooled``, first channel). Returns a record and its ground truth."""
    generator, all_frames, boxes, skills = np.random.default_rng(seed), [], [], []
    for _ in range(videos):
        level, box, frames = 1.0, np.array([20.0, 20, 30, 30]), []
        for _ in range(length):
            if generator.uniform() < 0.5:
                level, box = (
                    generator.uniform(0.2, 5),
                    np.array([*generator.uniform(5, 60, 2), 30, 30]),
                )
            skill = generator.uniform()
            skills.append(skill)
            boxes.append([box.tolist()])
            noise = [12 * (1 - skill), 4 * (1 - skill), 0.5]
            frames.append(
                (
                    level,
                    [
                        [
                            detection(
                                (box + generator.normal(0, one, 4)).clip(1).tolist(),
                                float(np.clip(0.95 - one / 20, 0.1, 1)),
                            )
                        ]
                        for one in noise
                    ],
                )
            )
        all_frames.append(frames)
    record = make_video_record(all_frames)
    for image, skill in zip(record['images'], skills):
        image['pooled'][0][0] = skill
    return record, truth(record, boxes)

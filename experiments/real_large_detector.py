"""Large aerial pictures with vehicles, and a detector for them: for experiments/real_large.py.

    python experiments/real_large_detector.py --data PICTURES --weights yolox_nano_mmdet.pth --out DIR

PICTURES is a folder with the pictures and YOLO labels of jekhor/aerial-cars-dataset on GitHub. Those
of 2 and 9 megapixels are split by picture, within each place, into train, val and test; smaller ones
are all for training. Cars, trucks, buses and minibuses are one class. The published YOLOX-nano is
fine-tuned briefly, on crops at all sizes at which exits see a picture.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.registry import init_default_scope
from real_tuning import Picture, tune

#: Beginnings of the names of the large pictures, one for each place.
PLACES = ('DJI-00760', 'DJI_0005-', 'DJI_0013-', 'DJI_0762-', 'DJI_')
#: Of each place's pictures.
TRAIN_SHARE, VAL_SHARE = 0.33, 0.17
#: COCO's index of cars, from which the new class starts.
CAR = 2


def main() -> None:
    """Split the pictures, and train."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', type=Path, required=True, help='folder of pictures and labels')
    parser.add_argument('--weights', type=Path, required=True, help="MMDetection's YOLOX-nano")
    parser.add_argument('--out', type=Path, required=True, help='folder for what comes out')
    parser.add_argument('--steps', type=int, default=400, help='of 8 crops: 400')
    parser.add_argument('--seed', type=int, default=0, help='of the split and the crops: 0')
    args = parser.parse_args()
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    args.out.mkdir(parents=True, exist_ok=True)
    for name, files in split_pictures(args.data, args.seed).items():
        (args.out / f'{name}.json').write_text(json.dumps(as_coco(files)))
    train(args)


def split_pictures(folder: Path, seed: int) -> dict[str, list[Path]]:
    """Pictures of each split."""
    random, taken = np.random.default_rng(seed), set()
    every = sorted(
        item
        for item in folder.iterdir()
        if item.suffix.lower() in ('.jpg', '.png') and item.is_file()
    )
    every = [item for item in every if item.with_suffix('.txt').exists()]
    splits = dict(train=[], val=[], test=[])
    for place in PLACES:
        group = [item for item in every if item.name.startswith(place) and item not in taken]
        taken.update(group)
        group = [group[row] for row in random.permutation(len(group))]
        first, second = np.round(len(group) * np.cumsum([TRAIN_SHARE, VAL_SHARE])).astype(int)
        for name, part in zip(splits, (group[:first], group[first:second], group[second:])):
            splits[name] += part
    splits['train'] += [item for item in every if item not in taken]
    return splits


def as_coco(files: list[Path]) -> dict:
    """Annotations of pictures."""
    images, annotations = [], []
    for number, file in enumerate(files, 1):
        height, width = cv2.imread(str(file)).shape[:2]
        images.append(dict(id=number, file_name=file.name, width=width, height=height))
        for left, top, right, bottom in boxes_of(file, height, width).tolist():
            box = [left, top, right - left, bottom - top]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=1,
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=0,
                )
            )
    categories = [dict(id=1, name='vehicle')]
    return dict(images=images, annotations=annotations, categories=categories)


def boxes_of(file: Path, height: int, width: int) -> np.ndarray:
    """Boxes of a picture's labels, (D, 4), left, top, right, bottom."""
    rows = [line.split() for line in file.with_suffix('.txt').read_text().splitlines()]
    values = np.array([row[1:5] for row in rows if len(row) == 5], float).reshape(-1, 4)
    low, high = values[:, :2] - values[:, 2:] / 2, values[:, :2] + values[:, 2:] / 2
    return np.clip(np.hstack([low, high]), 0, 1) * np.array([width, height] * 2)


def train(args: argparse.Namespace) -> None:
    """Fine-tune on crops at all sizes."""
    images = json.loads((args.out / 'train.json').read_text())['images']
    pictures = [cv2.imread(str(args.data / item['file_name'])) for item in images]
    boxes = [
        boxes_of(args.data / item['file_name'], item['height'], item['width']) for item in images
    ]
    # Small pictures are of long films of few places.
    chances = np.array([1.0 if item.shape[1] >= 1920 else 0.2 for item in pictures])
    chances /= chances.sum()

    def draw(random: np.random.Generator) -> Picture:
        row = random.choice(len(pictures), p=chances)
        return pictures[row], boxes[row], np.zeros(len(boxes[row]), int)

    tune(
        args.weights,
        (CAR,),
        ('vehicle',),
        draw,
        args.out / 'detector.pth',
        steps=args.steps,
        seed=args.seed,
        least=640,
        turned=True,
    )


if __name__ == '__main__':
    main()

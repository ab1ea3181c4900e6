"""Large aerial pictures with vehicles, and a detector for them: for experiments/real_large.py.

    python experiments/real_large_detector.py --data PICTURES --weights yolox_nano_mmdet.pth --out DIR

PICTURES is a folder with the pictures and YOLO labels of jekhor/aerial-cars-dataset on GitHub. Those
of 2 and 9 megapixels are split by picture, within each place, into train, val and test; smaller ones
are all for training. Cars, trucks, buses and minibuses are one class. The published YOLOX-nano is
fine-tuned briefly, on crops at all sizes at which exits see a picture.
"""

import argparse
import copy
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

STOCK = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'
#: Beginnings of the names of the large pictures, one for each place.
PLACES = ('DJI-00760', 'DJI_0005-', 'DJI_0013-', 'DJI_0762-', 'DJI_')
#: Of each place's pictures.
TRAIN_SHARE, VAL_SHARE = 0.33, 0.17
SIDE, BATCH, RATE = 416, 8, 1e-3
#: COCO's index of cars, from which the new class starts.
CAR = 2


def main() -> None:
    """Split the pictures, and train."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', type=Path, required=True, help='folder of pictures and labels')
    parser.add_argument('--weights', required=True, help="MMDetection's YOLOX-nano")
    parser.add_argument('--out', type=Path, required=True, help='folder for what comes out')
    parser.add_argument('--steps', type=int, default=120, help='of 8 crops: 120')
    parser.add_argument('--seed', type=int, default=0, help='of the split and the crops: 0')
    args = parser.parse_args()
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    args.out.mkdir(parents=True, exist_ok=True)
    for name, files in split_pictures(args.data, args.seed).items():
        (args.out / f'{name}.json').write_text(json.dumps(as_coco(files)))
    if not (args.out / 'detector.pth').exists():
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


def one_class_model() -> dict:
    """The stock model with one class, without augmentations of batches."""
    model = copy.deepcopy(get_config(STOCK).model.to_dict())
    model['bbox_head']['num_classes'] = 1
    model['data_preprocessor'].pop('batch_augments', None)
    return model


def train(args: argparse.Namespace) -> None:
    """Fine-tune on crops, averages of the weights are what is kept."""
    torch.manual_seed(args.seed)
    random = np.random.default_rng(args.seed)
    model = MODELS.build(one_class_model())
    state = torch.load(args.weights, map_location='cpu', weights_only=True)
    state = state.get('state_dict', state)
    for key in state:
        if 'multi_level_conv_cls' in key:
            state[key] = state[key][CAR : CAR + 1]
    model.load_state_dict(state)
    model.train()
    content = json.loads((args.out / 'train.json').read_text())
    pictures = [cv2.imread(str(args.data / item['file_name'])) for item in content['images']]
    boxes = [
        boxes_of(args.data / item['file_name'], item['height'], item['width'])
        for item in content['images']
    ]
    # Small pictures are of long films of few places.
    chances = np.array([1.0 if item.shape[1] >= 1920 else 0.2 for item in pictures])
    chances /= chances.sum()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, args.steps, pct_start=0.1)
    averages = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=True
    )
    for step in range(args.steps):
        drawn = [
            crop_of(pictures[row], boxes[row], random)
            for row in random.choice(len(pictures), BATCH, p=chances)
        ]
        images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
        losses = model.loss(images.float(), [sample_of(group) for _, group in drawn])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 35)
        optimizer.step()
        schedule.step()
        averages.update_parameters(model)
        if step % 10 == 0:
            print(step, f'{float(loss):.3f}', flush=True)
    meta = dict(dataset_meta=dict(classes=('vehicle',)), steps=args.steps, seed=args.seed)
    torch.save(dict(state_dict=averages.module.state_dict(), meta=meta), args.out / 'detector.pth')


def crop_of(
    picture: np.ndarray, boxes: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A square of a picture at a random size, and its boxes."""
    height, width = picture.shape[:2]
    least = min(1.0, 640 / max(height, width))
    scale = float(np.exp(random.uniform(np.log(least * 0.9), np.log(1.25))))
    side = SIDE / scale
    center = random.uniform([0, 0], [width, height])
    if len(boxes) and random.random() < 0.85:
        box = boxes[random.integers(len(boxes))]
        center = (box[:2] + box[2:]) / 2 + random.uniform(-0.4, 0.4, 2) * side
    left, top = center - side / 2
    matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
    low = np.clip([int(left) - 2, int(top) - 2], 0, [width - 1, height - 1])
    high = np.clip([int(left + side) + 3, int(top + side) + 3], 1, [width, height])
    high = np.maximum(high, low + 1)
    part = picture[low[1] : high[1], low[0] : high[0]]
    if scale < 1:
        part = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        shift = (low - [left, top]) * scale
        matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]])
    else:
        matrix[:, 2] = (low - [left, top]) * scale
    image = cv2.warpAffine(part, matrix, (SIDE, SIDE), borderValue=(114, 114, 114))
    moved = (boxes - np.array([left, top] * 2)) * scale
    centers = (moved[:, :2] + moved[:, 2:]) / 2
    inside = ((centers > 0) & (centers < SIDE)).all(1)
    moved = np.clip(moved[inside], 0, SIDE)
    moved = moved[((moved[:, 2:] - moved[:, :2]) > 2).all(1)]
    if random.random() < 0.5:
        image, moved = (
            image[:, ::-1],
            np.stack([SIDE - moved[:, 2], moved[:, 1], SIDE - moved[:, 0], moved[:, 3]], 1),
        )
    if random.random() < 0.5:
        image, moved = image.transpose(1, 0, 2), moved[:, [1, 0, 3, 2]]
    image = np.clip(image * random.uniform(0.7, 1.3), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image), moved


def sample_of(boxes: np.ndarray) -> DetDataSample:
    """A training sample."""
    shape = (SIDE, SIDE)
    sample = DetDataSample(
        metainfo=dict(img_shape=shape, batch_input_shape=shape, pad_shape=shape, ori_shape=shape)
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.from_numpy(boxes).float(), labels=torch.zeros(len(boxes), dtype=torch.long)
    )
    return sample


if __name__ == '__main__':
    main()

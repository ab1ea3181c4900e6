"""Short fine-tuning of a published YOLOX-nano on crops of pictures, for the experiments on films and large pictures."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.structures import InstanceData

from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.files import write_atomically
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

STOCK = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'
SIDE, BATCH, RATE = 416, 8, 1e-3
#: Every so many steps the state is written, from which a stopped training goes on.
KEPT = 50

#: A picture, (H, W, 3), uint8, BGR; its boxes, (D, 4), left, top, right, bottom; their labels, (D,).
Picture = tuple[np.ndarray, np.ndarray, np.ndarray]


def nano(classes: int) -> ConfigDict:
    """The stock model with so many classes, without augmentations of batches."""
    model = get_config(STOCK).model
    model.bbox_head.num_classes = classes
    model.data_preprocessor.pop('batch_augments', None)
    return model


def tune(
    weights: Path,
    origins: Sequence[int],
    classes: Sequence[str],
    draw: Callable[[np.random.Generator], Picture],
    out: Path,
    *,
    steps: int,
    seed: int,
    least: int,
    turned: bool = False,
) -> None:
    """Fine-tune; the averages of the weights become the checkpoint ``out``.

    Args:
        weights (Path): The published detector's.
        origins (Sequence[int]): From which of COCO's 80 classes each class starts.
        classes (Sequence[str]): Names.
        draw (Callable): Gives a picture at random.
        out (Path): The checkpoint. Beside it, until it is there, the state of the training.
        steps (int): Updates, of `BATCH` crops each.
        seed (int): Of the weights and the crops.
        least (int): The longest side at which an exit sees a whole picture; no crop is smaller in
            proportion.
        turned (bool): Whether pictures may be turned by a quarter. Defaults to False.
    """
    if out.exists():
        return
    torch.manual_seed(seed)
    model = MODELS.build(nano(len(classes)))
    state = read_checkpoint(str(weights))
    state = state.get('state_dict', state)
    model.load_state_dict(
        {
            key: value[list(origins)] if 'multi_level_conv_cls' in key else value
            for key, value in state.items()
        }
    )
    # On a CPU depthwise convolutions are faster that way.
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    averages = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98), use_buffers=True
    )
    parts = dict(model=model, optimizer=optimizer, schedule=schedule, averages=averages)
    kept, begin = out.with_suffix('.state.pth'), 0
    if kept.exists():
        state = torch.load(kept, map_location='cpu', weights_only=True)
        begin = state.pop('step')
        for name, part in parts.items():
            part.load_state_dict(state[name])
    start = time.monotonic()
    for step in range(begin, steps):
        random = np.random.default_rng((seed, step))
        drawn = [crop_of(*draw(random), random, least, turned) for _ in range(BATCH)]
        images = torch.from_numpy(np.stack([image for image, _, _ in drawn])).permute(0, 3, 1, 2)
        images = images.float().contiguous(memory_format=torch.channels_last)
        losses = model.loss(images, [sample_of(boxes, labels) for _, boxes, labels in drawn])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 35)
        optimizer.step()
        schedule.step()
        averages.update_parameters(model)
        if step % 10 == 0:
            left = (time.monotonic() - start) / (step + 1 - begin) * (steps - step - 1)
            print(f'{step}/{steps}: loss {float(loss):.3f}, {left / 60:.0f} min left', flush=True)
        if step % KEPT == KEPT - 1:
            state = {name: part.state_dict() for name, part in parts.items()}
            write_atomically(lambda file: torch.save(dict(state, step=step + 1), file), kept)
    meta = dict(dataset_meta=dict(classes=tuple(classes)), steps=steps, seed=seed)
    checkpoint = dict(state_dict=averages.module.state_dict(), meta=meta)
    write_atomically(lambda file: torch.save(checkpoint, file), out)
    kept.unlink(missing_ok=True)


def crop_of(
    picture: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    random: np.random.Generator,
    least: int,
    turned: bool,
) -> Picture:
    """A square of a picture at a random size, its boxes and their labels."""
    height, width = picture.shape[:2]
    smallest = min(1.0, least / max(height, width))
    scale = float(np.exp(random.uniform(np.log(smallest * 0.9), np.log(1.25))))
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
    moved = np.clip(moved, 0, SIDE)
    inside &= ((moved[:, 2:] - moved[:, :2]) > 2).all(1)
    moved, labels = moved[inside], labels[inside]
    if random.random() < 0.5:
        left, top, right, bottom = moved.T
        image, moved = image[:, ::-1], np.stack([SIDE - right, top, SIDE - left, bottom], 1)
    if turned and random.random() < 0.5:
        image, moved = image.transpose(1, 0, 2), moved[:, [1, 0, 3, 2]]
    image = np.clip(image * random.uniform(0.7, 1.3), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image), moved, labels


def sample_of(boxes: np.ndarray, labels: np.ndarray) -> DetDataSample:
    """A training sample."""
    shape = (SIDE, SIDE)
    sample = DetDataSample(
        metainfo=dict(img_shape=shape, batch_input_shape=shape, pad_shape=shape, ori_shape=shape)
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.from_numpy(boxes).float(), labels=torch.from_numpy(labels).long()
    )
    return sample

"""What it costs a detector to be trained as two exits: the published YOLOX-nano, tuned to seven classes of animals in a
few hundred updates, plain and as two exits in several ways, on the same batches.

    python experiments/real_animals_exits.py DATA OUT --weights WEIGHTS

DATA and OUT as of real_animals.py, which splits the pictures. Figures are AP of each exit by itself on the pictures that
are kept. An arm that is done is not done again.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from real_animals import LOAD, PAD, classes_of, split_pictures
from real_tuning import STOCK

from dynamicdet import cli
from dynamicdet.building import build_loader, build_model
from dynamicdet.cascade.weights import fit_weights
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.files import write_atomically
from dynamicdet.measuring.calibration import record_exits
from dynamicdet.models import DynamicDetector
from dynamicdet.models.resolution import reduce_samples
from dynamicdet.routing.bootstrap import bootstrap_weights, confidence_interval
from dynamicdet.routing.evaluation import Mixtures, read_truth
from mmdet.models.layers import ExpMomentumEMA

#: Published for batches of 64, in proportion; updates that warm up.
BATCH, LR, WARM_UP = 8, 0.00125, 20
#: Resamples of the pictures.
RESAMPLES = 200
#: Updates of BatchNorm's statistics where they are measured anew at the large size.
NORM_BATCHES = 30


class Arm(NamedTuple):
    """A way to train: weights of the exits' losses, what the dynamic detector is made of (one backbone if nothing),
    and a factor of the learning rate. ``in_turns``: one exit in each update."""

    weights: tuple[float, float] = (1.0, 1.0)
    model: dict = {}
    lr: float = 1.0
    in_turns: bool = False


_TWO = dict(backbones=2, shared=False, reuse_stages=0)
ARMS = {
    'plain': Arm((0, 1)),
    'one backbone, losses added': Arm(),
    'two backbones, own heads': Arm(model=_TWO),
    'one backbone, mean of losses': Arm((0.5, 0.5)),
    'one backbone, exits in turns': Arm(in_turns=True),
    'plain, small': Arm((1, 0)),
    'two backbones, one head': Arm(model=dict(_TWO, shared=True)),
    'plain, twice the rate': Arm((0, 1), lr=2.0),
}


def config_of(arm: Arm, paths: dict[str, Path], sizes: tuple[int, int]) -> Config:
    """A dynamic detector with these classes, and the data of all splits at the larger size."""
    small, large = sizes
    cfg = cli.read_config(STOCK)
    classes = classes_of(paths['train'])
    cfg.model.bbox_head.num_classes = len(classes)
    cfg.model.data_preprocessor.batch_augments = None
    detector = cfg.model.to_dict()
    cfg.model = {
        **dict(type='DynamicDetector', detector=detector, backbone=detector['backbone']),
        **dict(backbones=1, reuse_stages=0, first_scale=small / large),
        **arm.model,
    }
    for split in ('train', 'figures'):
        cfg[f'{split}_data'] = dict(
            batch_size=BATCH,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type='CocoDataset',
                metainfo=dict(classes=classes),
                data_prefix=dict(img=''),
                ann_file=str(paths[split]),
                test_mode=split != 'train',
                filter_cfg=dict(filter_empty_gt=True),
                pipeline=[
                    *LOAD,
                    dict(type='Resize', scale=(large, large), keep_ratio=True),
                    dict(type='Pad', size=(large, large), **PAD),
                    dict(
                        type='PackDetInputs',
                        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
                    ),
                ],
            ),
        )
    return cfg


def train(arm: Arm, cfg: Config, weights: Path, images: list, updates: int, seed: int) -> tuple:
    """The tuned detector, and its moving average by YOLOX's settings."""
    torch.manual_seed(seed)
    model: DynamicDetector = build_model(cfg)
    model.init_weights()
    fitted, line = fit_weights(model, read_checkpoint(str(weights))['state_dict'])
    model.load_state_dict(fitted, strict=False)
    print(line, flush=True)
    average = ExpMomentumEMA(model, momentum=0.0001, update_buffers=True)
    norms = [
        weight for _, weight in model.named_parameters() if weight.ndim < 2 and weight.requires_grad
    ]
    others = [
        weight for _, weight in model.named_parameters() if weight.ndim > 1 and weight.requires_grad
    ]
    optimizer = torch.optim.SGD(
        [dict(params=others, weight_decay=5e-4), dict(params=norms, weight_decay=0.0)],
        lr=LR,
        momentum=0.9,
        nesterov=True,
    )
    # On a CPU depthwise convolutions are faster that way.
    model.train().to(memory_format=torch.channels_last)
    draw, start = np.random.default_rng(seed), time.monotonic()
    for update in range(updates):
        if update % (len(images) // BATCH) == 0:
            order = draw.permutation(len(images))
        at = update % (len(images) // BATCH) * BATCH
        batch = [flipped(images[row], draw.random() < 0.5) for row in order[at : at + BATCH]]
        for group in optimizer.param_groups:
            group['lr'] = arm.lr * LR * rate(update, updates)
        exits = (1 - update % 2, update % 2) if arm.in_turns else arm.weights
        optimizer.zero_grad()
        loss = weighted_loss(model, model.data_preprocessor(pseudo_collate(batch), True), exits)
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        if update % 20 == 0 or update == updates - 1:
            print(f'{update}: loss {float(loss):.2f}, {time.monotonic() - start:.0f} s', flush=True)
    return model.eval(), average.module.eval()


def rate(update: int, updates: int) -> float:
    """Of the learning rate: linear warm-up, then half a cosine down to a twentieth."""
    return min(1.0, (update + 1) / WARM_UP) * (
        0.05 + 0.475 * (1 + np.cos(np.pi * update / updates))
    )


def flipped(image: dict, flip: bool) -> dict:
    """A copy of an image, from left to right if that is wanted."""
    inputs, sample = image['inputs'], copy.deepcopy(image['data_samples'])
    if flip:
        inputs = inputs.flip(-1)
        # The picture is at the left of its square.
        sample.gt_instances.bboxes.flip_(tuple(inputs.shape[-2:]))
    return dict(inputs=inputs, data_samples=sample)


def weighted_loss(model: DynamicDetector, data: dict, weights: tuple) -> torch.Tensor:
    """The sum of the exits' losses, each times its weight; exits of no weight do not run where they can be spared."""
    inputs, samples = (
        data['inputs'].contiguous(memory_format=torch.channels_last),
        data['data_samples'],
    )
    if len(model.backbone.names) > 1:
        losses = model.loss(inputs, samples)
        each = [
            model.parse_losses(
                {key: loss for key, loss in losses.items() if key.startswith(f'exit{exit}.')}
            )[0]
            for exit in range(2)
        ]
        return sum(weight * loss for weight, loss in zip(weights, each))
    total = 0
    for exit, weight in enumerate(weights):
        if weight:
            images, ratio = model.exit_images(exit, inputs)
            maps = model.backbone.select(model.backbone.first_maps(images))
            losses = model.branch(exit).loss(maps, reduce_samples(samples, ratio))
            total = total + weight * model.parse_losses(losses)[0]
    return total


@torch.no_grad()
def renormed(model: DynamicDetector, images: list) -> DynamicDetector:
    """A copy whose BatchNorm statistics are of the large size alone."""
    model = copy.deepcopy(model)
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for start in range(0, min(NORM_BATCHES * BATCH, len(images)), BATCH):
        batch = pseudo_collate([copy.deepcopy(image) for image in images[start : start + BATCH]])
        inputs = model.data_preprocessor(batch, False)['inputs']
        branch = model.branch(1)
        maps = model.backbone.select(model.backbone.first_maps(inputs))
        branch.bbox_head(branch.extract_feat(maps))
    return model.eval()


def judge(model: DynamicDetector, loader, truth, resamples: np.ndarray) -> dict:
    """AP of each exit, and on resampled pictures."""
    record = record_exits(model, loader, lambda steps, what: steps)
    mixtures = Mixtures(record, truth)
    choices = [np.full(len(record), exit) for exit in range(2)]
    return dict(
        ap=[mixtures.ap(choice) for choice in choices],
        resampled=[[mixtures.ap(choice, draw) for draw in resamples] for choice in choices],
    )


def do_arm(name: str, args: argparse.Namespace, paths: dict[str, Path]) -> dict:
    """Train one way, and judge it."""
    cfg = config_of(ARMS[name], paths, args.sizes)
    data = build_loader(cfg.train_data).dataset
    images = [data[row] for row in range(len(data))]
    start = time.process_time()
    model, average = train(ARMS[name], cfg, args.weights, images, args.updates, args.seed)
    result = dict(
        arm=name, updates=args.updates, seed=args.seed, seconds=time.process_time() - start
    )
    loader = build_loader(cfg.figures_data)
    truth = read_truth(str(paths['figures']))
    resamples = bootstrap_weights(len(loader.dataset), RESAMPLES, args.seed)
    result['as trained'] = judge(model, loader, truth, resamples)
    result['moving average'] = judge(average, loader, truth, resamples)
    if len(model.backbone.names) == 1:
        result['norms of the large size'] = judge(renormed(model, images), loader, truth, resamples)
    return result


def table(results: dict[str, dict]) -> list[str]:
    """AP of both exits in each arm, and the difference of exit 1 from the plain detector, paired over pictures."""
    lines = [
        '| trained | exit 0 | exit 1 | exit 1 less plain | moving average | own norms |',
        '|---|---|---|---|---|---|',
    ]
    plain = results.get('plain')
    for name, result in results.items():
        trained = result['as trained']
        said = ''
        if plain and name != 'plain':
            each = np.subtract(trained['resampled'][1], plain['as trained']['resampled'][1])
            low, high = confidence_interval(each)
            said = f'{trained["ap"][1] - plain["as trained"]["ap"][1]:+.1f} ({low:+.1f} to {high:+.1f})'
        averaged = result['moving average']['ap'][1]
        normed = result.get('norms of the large size')
        last = f'{normed["ap"][1]:.1f}' if normed else ''
        lines.append(
            f'| {name} | {trained["ap"][0]:.1f} | {trained["ap"][1]:.1f} | {said} | {averaged:.1f} | {last} |'
        )
    return lines


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data', type=Path, help='folder with annotations, train, val and test')
    parser.add_argument('out', type=Path, help='folder for results')
    parser.add_argument(
        '--weights', type=Path, required=True, help='published weights of YOLOX-nano'
    )
    parser.add_argument(
        '--sizes', nargs=2, type=int, default=(192, 320), help='sides at the exits: 192 320'
    )
    parser.add_argument('--updates', type=int, default=210, help='of 8 pictures: 210')
    parser.add_argument('--only', nargs='+', choices=ARMS, default=list(ARMS), help='arms')
    parser.add_argument('--seed', type=int, default=0, help='of weights, order and resamples: 0')
    args = parser.parse_args()
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    args.out.mkdir(parents=True, exist_ok=True)
    paths, results = split_pictures(args.data, args.out), {}
    for name in args.only:
        stem = f'exits {args.sizes[0]} {args.sizes[1]} {args.updates} {args.seed} {name}'
        path = args.out / f'{stem}.json'
        if not path.exists():
            write_atomically(json.dumps(do_arm(name, args, paths)).encode(), path)
        results[name] = json.loads(path.read_text())
        print(*table(results), sep='\n', flush=True)


if __name__ == '__main__':
    cli.run(main)

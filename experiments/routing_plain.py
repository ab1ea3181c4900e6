"""The record of a plain detector, so that the same functions judge it: one exit, named twice.

python experiments/routing_plain.py CONFIG CHECKPOINT OUT.npz
"""

import sys
import time

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from dynamicdet import cli
from dynamicdet.building import build_loader
from dynamicdet.cascade.weights import require_complete
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.measuring.calibration import coco_results, provenance
from dynamicdet.measuring.flops import count_flops
from dynamicdet.routing.record import RoutingRecord, write_record
from mmdet.apis import init_detector


@torch.no_grad()
def record_plain(config: str, checkpoint: str) -> RoutingRecord:
    """Detections of the test set, latency at batch 1 (median over 100 images) and mean GFLOPs of
    10."""
    cfg = Config.fromfile(config)
    model = init_detector(cfg, checkpoint=None, device='cpu')
    state = read_checkpoint(checkpoint)['state_dict']
    require_complete(model, state)
    model.load_state_dict(state, strict=False)
    loader = build_loader(cfg.test_dataloader)
    images: list[dict] = []
    for batch in cli.progress(loader, 'test set'):
        for sample in model.test_step(batch):
            detections = coco_results(sample, loader.dataset.cat_ids)
            images.append(
                dict(
                    id=sample.img_id,
                    file=sample.img_path,
                    difficulty=0.5,
                    detections=[detections, detections],
                )
            )
    latency, gflops = _costs(model, loader.dataset)
    facts = provenance(cfg, checkpoint, loader.dataset, 'cpu')
    return RoutingRecord.from_images(images, [gflops] * 2, [latency] * 2, facts)


def _costs(model, dataset) -> tuple[float, float]:
    batches = [pseudo_collate([dataset[index]]) for index in range(20)]
    seconds = []
    for turn in range(6):
        for batch in batches:
            start = time.perf_counter()
            model.test_step(batch)
            seconds += [time.perf_counter() - start] * (turn > 0)
    flops, _ = count_flops(lambda: [model.test_step(batch) for batch in batches[:10]])
    return float(np.median(seconds)), flops / 10 / 1e9


def main() -> None:
    cli.prepare()
    config, checkpoint, out = sys.argv[1:]
    write_record(record_plain(config, checkpoint), out)


if __name__ == '__main__':
    cli.run(main)

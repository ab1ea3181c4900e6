"""AP, AP50 and file size of a detector, compressed in several ways, for the experiment on
compression.

    python experiments/compression_measure.py CONFIG CHECKPOINT STEP OUT.json

The test images are loaded once. What is in OUT.json already is not measured again.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from compression_runs import SEED, all_steps
from mmengine.config import Config
from pycocotools.coco import COCO

from dynamicdet import cli
from dynamicdet.building import build_loader, load_detector
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.compression.ddz import compress, decompress
from dynamicdet.compression.encoding import Lossy
from dynamicdet.compression.pruning import prune_weights
from dynamicdet.compression.pruning_blocks import PruningBlock
from dynamicdet.compression.size_report import BlockSize, block_sizes, total_size
from dynamicdet.files import write_atomically
from dynamicdet.measuring.calibration import coco_results, provenance
from dynamicdet.routing.bootstrap import bootstrap_weights
from dynamicdet.routing.evaluation import Mixtures
from dynamicdet.routing.record import RoutingRecord

#: Of the test images, all with seed 0, so that points are compared on the same images.
RESAMPLES = 100


def measure_points(config: str, checkpoint: str, points: Mapping[str, dict], out: Path) -> None:
    """Measure all points, and write what is known after each."""
    measured = json.loads(out.read_text()) if out.exists() else dict(points={})
    waiting = [name for name in points if name not in measured['points']]
    if not waiting:
        return
    cfg = Config.fromfile(config)
    state = read_checkpoint(checkpoint)['state_dict']
    model = load_detector(cfg, dict(state_dict=state))[0]
    loader = build_loader(cfg.test_dataloader)
    with cli.silence():
        coco = COCO(cfg.test_evaluator.ann_file)
    batches = list(cli.progress(loader, 'test images'))
    measured.update(
        seed=SEED,
        resamples=RESAMPLES,
        provenance=provenance(cfg, checkpoint, loader.dataset, 'cpu'),
    )
    for name in cli.progress(waiting, 'points'):
        model.load_state_dict(state, strict=False)
        size = _apply(model, **points[name])
        measured['points'][name] = dict(
            bytes=size.in_file,
            float32_megabytes=size.megabytes,
            pruned=size.pruned,
            error=size.error,
            **judge(model, batches, coco, loader.dataset.cat_ids),
        )
        write_atomically(json.dumps(measured).encode(), out)


def _apply(
    model, blocks: Sequence[dict] = (), lossy: Mapping[str, object] | None = None
) -> BlockSize:
    """Compress a model, in place; what its file would hold."""
    if blocks:
        prune_weights(model, [PruningBlock(**block) for block in blocks], SEED)
    state = model.state_dict()
    compressed = compress(dict(state_dict=state), Lossy(**lossy or {}))
    size = total_size(block_sizes(state, compressed.entries), len(compressed.content))
    model.load_state_dict(decompress(compressed.content)['state_dict'])
    return size


@torch.no_grad()
def judge(model, batches: Sequence[dict], coco: COCO, category_ids: list[int]) -> dict[str, object]:
    """AP and AP50, in percent, on the images and on resamples of them."""
    images = []
    for batch in batches:
        for sample in model.test_step(batch):
            detections = coco_results(sample, category_ids)
            # A record has two exits or more.
            images.append(
                dict(
                    id=sample.img_id,
                    file=sample.img_path,
                    difficulty=0.5,
                    detections=[detections] * 2,
                )
            )
    mixtures = Mixtures(
        RoutingRecord.from_images(images, gflops=[0.0] * 2, latencies=[0.0] * 2), coco
    )
    choice = [0] * len(images)
    resampled = [
        mixtures.scores(choice, weights, sizes=False)
        for weights in bootstrap_weights(len(images), RESAMPLES)
    ]
    return dict(
        mixtures.scores(choice, sizes=False),
        resampled_ap=[round(resample['ap'], 3) for resample in resampled],
        resampled_ap50=[round(resample['ap50'], 3) for resample in resampled],
    )


def main() -> None:
    cli.prepare()
    torch.set_num_threads(1)
    config, checkpoint, name, out = sys.argv[1:]
    (step,) = (step for step in all_steps() if step.name == name)
    measure_points(config, checkpoint, step.points, Path(out))


if __name__ == '__main__':
    cli.run(main)

"""What it is worth that maps go from graph to graph in 8 bits (`dynamicdet.deploy.joins`).

    OMP_NUM_THREADS=1 python experiments/joins.py [yolox_s] [faster_rcnn_r50]

Each detector is deployed in int8 twice, with joins and without, and both see the same images in turns, in one process,
on one thread. Seconds are of the processor, not of the clock: the machine may do other things. Weights and images are
random, which latencies of graphs do not depend on. Writes experiments/results/joins.json.
"""

import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config

from dynamicdet.deploy import deployment
from dynamicdet.deploy.graphs import Graph, export_stages
from dynamicdet.deploy.int8 import needs_reduced_range
from dynamicdet.deploy.latencies import conditions
from dynamicdet.deploy.rois import place_roi_aligns
from dynamicdet.files import write_atomically
from dynamicdet.measuring.calibration import force_exit
from dynamicdet.models.stages import find_stages
from dynamicdet.testing import randomize
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'experiments' / 'results' / 'joins.json'
#: Of which all exits are timed; exit 0 is what the plain detector computes.
CONFIGS = dict(yolox_s='dy_yolox_s.py', faster_rcnn_r50='dy_faster_rcnn.py')
SIDES = dict(yolox_s=640, faster_rcnn_r50=448)
IMAGES, ROUNDS = 2, dict(yolox_s=6, faster_rcnn_r50=5)


def image(seed: int, side: int) -> dict:
    """A batch of one image, as a data loader gives it."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8)
    shape = dict(img_shape=(side, side), ori_shape=(side, side), scale_factor=(1.0, 1.0))
    return dict(inputs=[pixels], data_samples=[DetDataSample(metainfo=shape)])


def deployed(model, batches: list[dict], joined: bool):
    """The detector in int8 graphs: no layer is float but those that predict."""
    exported = export_stages(copy.deepcopy(model))
    driven, model = copy.deepcopy(model), copy.deepcopy(model)
    found = deployment.joins_of
    if not joined:
        deployment.joins_of = lambda sources: []
    try:
        contents, _ = deployment._int8(
            driven, find_stages(driven), exported, batches, lambda steps, _: steps,
            None, 'mse', math.inf, 0.1, None, True,
        )  # fmt: skip
    finally:
        deployment.joins_of = found
    deployment._place(find_stages(model), contents, exported)
    place_roi_aligns(model)
    return model


class Clock:
    """Processor time in graphs, summed."""

    def __init__(self) -> None:
        self.seconds, run = 0.0, Graph.__call__

        def timed(graph: Graph, *inputs):
            start = time.process_time()
            outputs = run(graph, *inputs)
            self.seconds += time.process_time() - start
            return outputs

        Graph.__call__ = timed


def measure(name: str, clock: Clock) -> dict:
    cfg = Config.fromfile(ROOT / 'configs' / CONFIGS[name])
    # Of random scores hardly any: suppressing thousands of boxes is no part of this.
    own = cfg.model.detector.test_cfg
    own.get('rcnn', own).score_thr = 0.99
    if 'rpn' in own:
        # As many for an image of this size as the 1000 are for 800 x 1216.
        own.rpn.max_per_img = 200
    model = randomize(MODELS.build(cfg.model)).eval()
    batches = [image(seed, SIDES[name]) for seed in range(IMAGES)]
    variants = {joined: deployed(model, batches[:1], joined) for joined in (True, False)}
    found = {}
    for exit in range(model.num_exits):
        times: dict[tuple[bool, str], list[float]] = {}
        for turn in range(ROUNDS[name] + 1):
            for place, batch in enumerate(batches):
                # Who is first changes with each image and round.
                for joined in (True, False)[:: 1 if (turn + place) % 2 else -1]:
                    force_exit(variants[joined], exit)
                    clock.seconds, start = 0.0, time.process_time()
                    with torch.no_grad():
                        variants[joined].test_step(copy.deepcopy(batch))
                    if turn:
                        whole = time.process_time() - start
                        times.setdefault((joined, 'graphs'), []).append(clock.seconds)
                        times.setdefault((joined, 'whole'), []).append(whole)
        found[f'exit{exit}'] = {
            part: dict(
                joined=float(np.median(times[True, part])),
                apart=float(np.median(times[False, part])),
                # Of each pair of neighbors in time.
                saved=float(np.median(1 - np.divide(times[True, part], times[False, part]))),
                saved_quartiles=np.percentile(
                    1 - np.divide(times[True, part], times[False, part]), [25, 75]
                ).tolist(),
            )
            for part in ('graphs', 'whole')
        }
    return found


def main() -> None:
    torch.set_num_threads(1)
    clock = Clock()
    results = dict(
        sides=SIDES,
        images=IMAGES,
        rounds=ROUNDS,
        reduced_range=needs_reduced_range(),
        **conditions(threads=1),
        detectors=json.loads(OUT.read_text())['detectors'] if OUT.is_file() else {},
    )
    for name in sys.argv[1:] or CONFIGS:
        results['detectors'][name] = measure(name, clock)
        write_atomically((json.dumps(results, indent=1) + '\n').encode(), OUT)
        print(name, json.dumps(results['detectors'][name]), flush=True)


if __name__ == '__main__':
    main()

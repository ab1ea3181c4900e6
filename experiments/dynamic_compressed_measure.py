"""AP and file size, or latency, of one detector's variants, for the experiment on dynamic and
compressed.

    python experiments/dynamic_compressed_measure.py ap OUT.json FOLDER
    python experiments/dynamic_compressed_measure.py clock OUT.json SIDE IMAGES ROUNDS FOLDER FOLDER

A FOLDER holds a calibrated dynamic detector: config.py, calibrated.pth, and graphs in float32/ and
int8/. APs that are in OUT.json already are not measured again. Latencies are of all variants of all
folders, in turns, on images of SIDE x SIDE pixels.
"""

import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from compression_measure import RESAMPLES
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from pycocotools.coco import COCO

from dynamicdet import cli
from dynamicdet.building import build_loader, load_detector
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.compression.ddz import compress, decompress
from dynamicdet.compression.encoding import Lossy
from dynamicdet.deploy.folder import load_deployed
from dynamicdet.deploy.int8 import needs_reduced_range
from dynamicdet.files import write_atomically
from dynamicdet.measuring.benchmark import (
    BenchmarkTask,
    half_hard_threshold,
    quartiles,
    time_interleaved,
)
from dynamicdet.measuring.calibration import provenance, record_exits
from dynamicdet.models import DynamicDetector
from dynamicdet.routing.bootstrap import bootstrap_weights
from dynamicdet.routing.evaluation import Mixtures, difficulties_of
from dynamicdet.routing.thresholds import ALL_EASY, ALL_HARD

CONFIG, WEIGHTS = 'config.py', 'calibrated.pth'
#: How a detector is handed over: form -> options of tools/export.py; None for torch, from a .ddz
#: file.
FORMS: dict[str, tuple[str, ...] | None] = dict(
    eager=None,
    eager_int8=None,
    float32=(),
    int8=('--int8', '--compress'),
    int8_all=('--int8', '--compress', '--float-share=0'),
)
#: Graphs that another library runs, too: form -> the form they were exported as, and what runs
#: them.
RUN_BY = dict(int8_openvino=('int8', 'openvino'))
#: What a .ddz file held is as fast as before; graphs without a float layer say what keeping some is
#: worth.
UNTIMED = ('eager_int8', 'int8_all')
#: How the .ddz file of a form is written.
LOSSY = dict(eager=Lossy(), eager_int8=Lossy(int8=[]))
#: Sides at which latency is measured: that of the experiment, and one at which networks outweigh
#: what is around them, as on users' images; on how many test images, and in how many rounds.
SIDES = {128: (20, 15), 640: (6, 15)}


def all_forms() -> list[str]:
    return [*FORMS, *(form for form, (exported, _) in RUN_BY.items() if exported in FORMS)]


def load(folder: Path, form: str) -> tuple[DynamicDetector, int]:
    """A detector, and the bytes of what a user would be handed."""
    exported, runtime = RUN_BY.get(form, (form, 'onnxruntime'))
    if FORMS[exported] is not None:
        files = [path.stat().st_size for path in (folder / exported).iterdir()]
        return load_deployed(str(folder / exported), 1, runtime), sum(files)
    content = compress(read_checkpoint(str(folder / WEIGHTS)), LOSSY[form]).content
    return load_detector(Config.fromfile(folder / CONFIG), decompress(content))[0], len(content)


def measure_ap(folder: Path, out: Path) -> None:
    """AP of all forms on the test set: at each exit, and at half hard as calibrated."""
    measured = json.loads(out.read_text()) if out.exists() else dict(points={})
    cfg = Config.fromfile(folder / CONFIG)
    loader = build_loader(dict(cfg.test_dataloader, num_workers=0, persistent_workers=False))
    with cli.silence():
        coco = COCO(cfg.test_evaluator.ann_file)
    measured.update(
        original_bytes=(folder / WEIGHTS).stat().st_size,
        resamples=RESAMPLES,
        provenance=provenance(cfg, str(folder / WEIGHTS), loader.dataset, 'cpu'),
    )
    for form in all_forms():
        exported, _ = RUN_BY.get(form, (form, None))
        is_there = FORMS[exported] is None or (folder / exported).exists()
        if is_there and form not in measured['points']:
            model, size = load(folder, form)
            measured['points'][form] = dict(bytes=size, **judge(model, loader, coco))
            write_atomically(json.dumps(measured).encode(), out)


def judge(model: DynamicDetector, loader, coco: COCO) -> dict:
    """``exit0``, ``half`` and ``exit1``: AP, AP50 and AP on resamples of the images; ``hard_share``
    of the second."""
    record = record_exits(model, loader, cli.progress)
    mixtures = Mixtures(record, coco)
    hard = difficulties_of(record) > model.threshold.item()
    choices = dict(exit0=np.zeros(len(hard), int), half=hard, exit1=np.ones(len(hard), int))
    weights = bootstrap_weights(len(hard), RESAMPLES)
    return dict(
        hard_share=float(hard.mean()),
        **{
            name: dict(
                mixtures.scores(choice, sizes=False),
                resampled_ap=[round(mixtures.ap(choice, resample), 3) for resample in weights],
            )
            for name, choice in choices.items()
        },
    )


def measure_latencies(
    folders: Sequence[Path], side: int, images: int, rounds: int, out: Path
) -> None:
    """Seconds per image of all detectors at each exit and at half hard: batch 1, images of some
    side in memory, from preprocessing to boxes, all taking turns."""
    before = os.getloadavg()[0]
    cfg = Config.fromfile(folders[0] / CONFIG)
    (resize,) = (step for step in cfg.test_dataloader.dataset.pipeline if step.type == 'Resize')
    resize.scale = (side, side)
    dataset = build_loader(
        dict(cfg.test_dataloader, num_workers=0, persistent_workers=False)
    ).dataset
    batches = [pseudo_collate([dataset[index]]) for index in range(min(images, len(dataset)))]
    tasks = {}
    for folder in folders:
        for form in (form for form in all_forms() if form not in UNTIMED):
            model, _ = load(folder, form)
            tasks.update(
                {f'{folder.name}/{form}/{name}': task for name, task in tasks_of(model, batches)}
            )
    seconds = time_interleaved(tasks, rounds, cli.progress, 'latencies')
    facts = dict(
        provenance(cfg, str(folders[0] / WEIGHTS), dataset, 'cpu'),
        images=len(batches),
        side=side,
        rounds=rounds,
        vnni=not needs_reduced_range(),
        load_before=before,
        load_after=os.getloadavg()[0],
        amx=has_amx(),
        onnxruntime=version('onnxruntime'),
        openvino=version('openvino'),
    )
    points = {name: quartiles(values / len(batches)) for name, values in seconds.items()}
    write_atomically(json.dumps(dict(provenance=facts, points=points)).encode(), out)


def has_amx() -> bool:
    """Whether the processor multiplies tiles of 8 bits."""
    cpu = Path('/proc/cpuinfo')
    return cpu.exists() and 'amx_int8' in cpu.read_text()


def tasks_of(model: DynamicDetector, batches: list[dict]) -> list[tuple[str, BenchmarkTask]]:
    """The same images, all easy, half of them hard, all hard."""
    thresholds = dict(exit0=ALL_EASY, half=half_hard_threshold(model, batches), exit1=ALL_HARD)
    return [
        (name, BenchmarkTask(model, batches, threshold)) for name, threshold in thresholds.items()
    ]


def main() -> None:
    cli.prepare()
    torch.set_num_threads(1)
    what, out, *more = sys.argv[1:]
    if what == 'ap':
        measure_ap(Path(more[0]), Path(out))
    else:
        side, images, rounds, *folders = more
        measure_latencies(
            [Path(folder) for folder in folders], int(side), int(images), int(rounds), Path(out)
        )


if __name__ == '__main__':
    cli.run(main)

"""What a router trained as users train it, by `RouterHook` in step 2, is worth under each
objective.

The experiment on routing fits its routers to records. Here they are trained epoch by epoch, on the
cascades of its variant `depth_resolution`; these are trained first where their weights are not in
work_dirs/routing. It goes step by step, several at a time; each cascade leaves a small file in
experiments/results/routing_hook: stop it when you like and start it again.
"""

import json
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from pycocotools.coco import COCO
from routing import WORK as ROUTING
from routing import make_data
from routing import train as train_cascade
from routing_results import INNER, RESAMPLES
from routing_runs import DATA, DETECTORS, DYNAMIC, HELD_OUT, SEEDS, Run, all_runs, data_options
from steps import ROOT, do_all, make_parser, reading, run, train_once, wait_for

from dynamicdet import cli
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.files import write_atomically
from dynamicdet.models import Router
from dynamicdet.routing.curve import RandomRouting, split_by_share
from dynamicdet.routing.evaluation import Mixtures
from dynamicdet.routing.record import read_record
from dynamicdet.routing.router_fitting import features_of_record, rank_correlation
from dynamicdet.routing.strata import exit_benefits

WORK = ROOT / 'work_dirs' / 'routing_hook'
RESULTS = ROOT / 'experiments' / 'results' / 'routing_hook'
VARIANT = 'depth_resolution'
#: The paper's objective, and the one that is held against it.
OBJECTIVES = ('paper', 'rank')
#: As the configs for COCO do, step 2 takes images that step 1 saw: so many of them.
IMAGES = HELD_OUT


def cascades() -> list[Run]:
    """The cascades, behind what they start from."""
    runs = all_runs()
    wanted = [run for run in runs if run.variant == VARIANT]
    starts = {run.start for run in wanted}
    return [run for run in runs if run.name in starts] + wanted


def router_config(run: Run, objective: str) -> Config:
    """Step 2 of a cascade: its detector's usual config, on this experiment's data."""
    with reading:
        cfg = Config.fromfile(ROOT / DETECTORS[run.detector].dynamic.replace('.py', '_router.py'))
    cfg.merge_from_dict(
        {
            **data_options(DATA['root'], DATA['size']),
            **DYNAMIC[VARIANT],
            'model.objective': objective,
            'train_dataloader.dataset.indices': IMAGES,
            'randomness.seed': run.seed,
        }
    )
    (hook,) = (hook for hook in cfg.custom_hooks if hook.type == 'RouterHook')
    hook.cascade = str(ROUTING / run.name)
    # A validation tells nothing that the test set does not.
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    return cfg


def train_router(run: Run, objective: str) -> Path:
    """Step 2, or go on with it; its last checkpoint."""
    folder = WORK / run.name / objective

    def write_config() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        router_config(run, objective).dump(folder / 'config.py')
        return folder / 'config.py'

    return Path(train_once(folder, write_config))


def record_test(cascade: Run, config: Path, checkpoint: Path) -> Path:
    """The cascade's record of the test set; all of its routers see the same features."""
    path = WORK / cascade.name / 'test.npz'
    if not path.exists():
        run(
            'tools/record.py',
            str(config),
            str(checkpoint),
            f'--out={path}',
            '--view=none',
            '--no-data-check',
            log=path.with_name('record.log'),
        )
    return path


def logits(checkpoint: Path, features: np.ndarray) -> np.ndarray:
    """What a trained router makes of pooled features: it ranks as the difficulty does."""
    state = read_checkpoint(str(checkpoint))['state_dict']
    router = Router([features.shape[1]])
    router.load_state_dict(
        {
            key.removeprefix('router.'): value
            for key, value in state.items()
            if key.startswith('router.')
        }
    )
    with torch.no_grad():
        return router.logits(torch.from_numpy(features)).numpy()


def judge(path: Path, routers: dict) -> dict:
    """AP of each router at each share; on each resample of the test set, in the mean over
    shares."""
    record = read_record(path)
    with cli.silence():
        coco = COCO(ROOT / DATA['root'] / 'annotations/instances_test.json')
    mixtures = Mixtures(record, coco)
    random_routing, features = (
        RandomRouting(mixtures, resamples=RESAMPLES),
        features_of_record(record),
    )
    gained = exit_benefits(record, mixtures)['loss_objects']
    results = {}
    for name, checkpoint in routers.items():
        scores = logits(checkpoint, features)
        choices = [random_routing.choice(split_by_share(scores, share)[1]) for share in INNER]
        resampled = np.mean([random_routing.resampled(choice) for choice in choices], axis=0)
        results[name] = dict(
            ap=[mixtures.ap(choice) for choice in choices],
            resampled_mean=[round(float(value), 3) for value in resampled],
            earning=rank_correlation(scores, gained),
        )
    return dict(
        exits=[mixtures.ap(np.full(mixtures.images, exit)) for exit in range(mixtures.exits)],
        random=[random_routing.at(round(share * mixtures.images))[0] for share in INNER],
        provenance=record.provenance,
        routers=results,
    )


def do(run: Run) -> None:
    """All of one cascade."""
    wait_for(run.start)
    train_cascade(run)
    if run.variant != VARIANT:
        return
    trained = {objective: train_router(run, objective) for objective in OBJECTIVES}
    checkpoint = next(iter(trained.values()))
    numbers = judge(record_test(run, checkpoint.with_name('config.py'), checkpoint), trained)
    write_atomically(
        json.dumps(dict(run=run.name, **numbers)).encode(), RESULTS / f'{run.name}.json'
    )


def main() -> None:
    args = make_parser(__doc__, 'cascades').parse_args()
    torch.set_num_threads(1)
    wanted = [
        run
        for run in cascades()
        if run.variant == VARIANT and any(part in run.name for part in args.only)
    ]
    waiting = {run.name for run in wanted if not (RESULTS / f'{run.name}.json').exists()}
    needed = {run.start for run in wanted if run.name in waiting}
    todo = {run.name: run for run in cascades() if run.name in waiting | needed}
    print(
        f'{len(wanted)} cascades of {len(SEEDS)} seeds, {len(todo)} runs to do: ' + ', '.join(todo),
        flush=True,
    )
    if args.list or not todo:
        return
    make_data()
    do_all(list(todo), lambda name: do(todo[name]), args.jobs)


if __name__ == '__main__':
    cli.run(main)

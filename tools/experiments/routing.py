"""The experiment on routing, docs/benchmarks.md: train, record, fit routers, sum up.

Hours on two cores, so it goes step by step, several at a time, and each step leaves a file: stop it when
you like and start it again. What a run came to is a small file in docs/results/routing; runs that have
one are not trained again. Remove the file to do so.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List

from mmengine.config import Config
from routing_runs import DATA, Run, all_runs

from dynamicdet.apis import cli
from dynamicdet.engine import latest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / 'work_dirs' / 'routing'
RESULTS = ROOT / 'docs' / 'results' / 'routing'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', nargs='+', default=[''], help='runs whose names contain one of these')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, of one thread each')
    parser.add_argument('--list', action='store_true', help='say what there is to do, and stop')
    return parser.parse_args()


def run(*command: str, log: Path) -> None:
    """Run a tool in the repository's root, its output into a file; end with it if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as file:
        code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env={**os.environ, 'OMP_NUM_THREADS': '1'}).returncode
    if code:
        raise RuntimeError(f'{command[0]} failed with status {code}: see the end of {log}')


def make_data() -> None:
    sizes = [f'--{split}={DATA[split]}' for split in ('train', 'val', 'test')]
    run('tools/make_digits.py', f"--root={DATA['root']}", f"--size={DATA['size']}", *sizes,
        log=WORK / 'data.log')


def train(one: Run) -> str:
    """Train a run, or go on with it; its last checkpoint."""
    folder = WORK / one.name
    if not (folder / 'trained').exists():
        config = write_config(one)
        run('tools/train.py', str(config), '--no-data-check', '--resume', f'--work-dir={folder}',
            log=folder / 'train.log')
        (folder / 'trained').touch()
    return latest_checkpoint(str(folder))


def write_config(one: Run) -> Path:
    """A run's config, whole; the other tools read it too."""
    cfg = Config.fromfile(ROOT / one.config)
    cfg.merge_from_dict(one.options)
    if one.start:
        cfg.load_from = latest_checkpoint(str(WORK / one.start))
    path = WORK / one.name / 'config.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(path)
    return path


def do(one: Run) -> str:
    """All of one run."""
    start = time.monotonic()
    train(one)
    return f'{one.name}: {(time.monotonic() - start) / 60:.1f} min'


def main() -> None:
    args = parse_args()
    runs: List[Run] = [one for one in all_runs() if any(part in one.name for part in args.only)]
    waiting = [one for one in runs if not (RESULTS / f'{one.name}.json').exists()]
    print(f'{len(runs)} runs, {len(waiting)} to do: ' + ', '.join(one.name for one in waiting), flush=True)
    if args.list or not waiting:
        return
    make_data()
    # What others start from comes first, and is waited for.
    for stage in ([one for one in waiting if not one.start], [one for one in waiting if one.start]):
        start = time.monotonic()
        with ThreadPoolExecutor(args.jobs) as pool:
            for done, said in enumerate(pool.map(do, stage), 1):
                left = (time.monotonic() - start) / done * (len(stage) - done)
                print(f'[{done}/{len(stage)}] {said}, {left / 60:.0f} min left', flush=True)


if __name__ == '__main__':
    cli.run(main)

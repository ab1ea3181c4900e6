"""Detection in bulk on a Ray cluster of this machine: two pools of processes against one, at half
hard.

The small YOLOX of the built-in data (random weights: what is measured is time), pictures of 128
pixels. Rates are from the first part that is done to the last, without the start of processes. All
tables are compared. Writes experiments/results/bulk_pools.json.
"""

import argparse
import functools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as parquet
import torch
from mmengine.config import Config
from serving_load import CONFIG, make_detector

from dynamicdet.bulk import pools
from dynamicdet.bulk.one_process import detect_all
from dynamicdet.bulk.passes import build_passes
from dynamicdet.bulk.sources import Picture, list_pictures
from dynamicdet.bulk.table import ResultTable
from dynamicdet.files import write_atomically
from dynamicdet.routing.budget import Budget
from dynamicdet.routing.thresholds import threshold_for_share

ROOT = Path(__file__).resolve().parents[1]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pictures', type=int, default=400, help='how many: 400')
    parser.add_argument('--part-size', type=int, default=16, help='pictures of a part: 16')
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 8], help='1 8')
    parser.add_argument('--seed', type=int, default=0, help='of the weights: 0')
    parser.add_argument('--work-dir', default='work_dirs/serving_load')
    parser.add_argument('--out', default=str(ROOT / 'experiments/results/bulk_pools.json'))
    return parser.parse_args()


def main():
    args = parse_args()
    folder = Path(args.work_dir)
    checkpoint, _ = make_detector(folder, args.seed)
    originals = list_pictures([str(folder / 'digits' / 'test')])
    pictures = [
        # The same files, under other names.
        Picture(f'{number}-{originals[number % len(originals)].name}', *originals[number % len(originals)][1:])
        for number in range(args.pictures)
    ]  # fmt: skip
    cfg, results, ray = Config.fromfile(CONFIG), [], pools.start(workers=2)
    build = functools.partial(build_passes, cfg, str(checkpoint), 'cpu')
    model = build(Budget.parse(threshold=-1.0), 1, 10**7)
    with tempfile.TemporaryDirectory() as temporary:
        with ResultTable(f'{temporary}/all.parquet', originals, {}) as table:
            detect_all(model, table, lambda _: None)
            table.finish()
        difficulties = parquet.read_table(f'{temporary}/all.parquet')['difficulty'].to_pylist()
        budget = Budget.parse(threshold=threshold_for_share(difficulties, 0.5))
        for batch_size in args.batch_sizes:
            wanted, one = None, functools.partial(build, budget, batch_size, 10**7)
            for name, settings in {
                'one process': None,
                'one pool of two': dict(pools=1),
                'two pools, maps': dict(handover='maps'),
                'two pools, picture': dict(handover='picture'),
            }.items():
                out, times, passes = f'{temporary}/{len(results)}.parquet', [], one()

                def tell(_, times=times):
                    times.append(time.monotonic())

                with ResultTable(out, pictures, {}, args.part_size) as table:
                    why = ''
                    if settings is None:
                        detect_all(passes, table, tell)
                    else:
                        plan = pools.make_plan(ray, passes, table, 2, 0.5, **settings)
                        why = plan.why
                        pools.detect_in_pools(ray, one, table, plan, tell)
                    table.finish()
                found = parquet.read_table(out)
                wanted = wanted or found
                results.append(
                    dict(
                        name=name,
                        batch_size=batch_size,
                        rate=(len(times) - 1) * args.part_size / (times[-1] - times[0]),
                        equal=found.equals(wanted),
                        hard=sum(found['exit'].to_pylist()) / len(found),
                        plan=why,
                    )
                )
                print(json.dumps(results[-1]), flush=True)
    ray.shutdown()
    about = dict(
        command=' '.join(['python', 'experiments/bulk_pools.py', *sys.argv[1:]]),
        machine=f'{platform.machine()}, {len(os.sched_getaffinity(0))} core(s) for all processes',
        torch=torch.__version__,
        load_average=os.getloadavg(),
        results=results,
    )
    write_atomically((json.dumps(about, indent=1) + '\n').encode(), args.out)


if __name__ == '__main__':
    main()

"""How much memory a routing record takes: record_memory.py [IMAGES [DETECTIONS]].

A synthetic record, of the size of COCO's val2017 unless told otherwise: two exits, two views,
features of 512 numbers. Says what its arrays take, what Python allocated for all of it, and the
same after it was written and read; the peaks of both; and the file's size.
"""

import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from dynamicdet.routing.record import Detections, RoutingRecord, read_record, write_record

EXITS, FEATURES = 2, 512


def synthetic(images: int, per_image: int) -> RoutingRecord:
    generator = np.random.default_rng(0)

    def detections() -> Detections:
        count = images * per_image
        return Detections(
            generator.random((count, 4), np.float32) * 640,
            generator.random(count, np.float32),
            generator.integers(1, 91, count, dtype=np.int32),
            np.arange(images + 1) * per_image,
        )

    return RoutingRecord(
        np.arange(images),
        [f'data/coco/val2017/{index:012}.jpg' for index in range(images)],
        generator.random(images),
        [detections() for _ in range(EXITS)],
        [1.0, 2.0],
        [0.1, 0.2],
        view=[detections() for _ in range(EXITS)],
        losses=generator.random((images, EXITS)),
        features=generator.random((images, FEATURES), np.float32),
        objects=generator.integers(0, 20, images),
        entropy=generator.random(images),
        image_gflops=np.ones((images, EXITS)),
        image_latencies=np.ones((images, EXITS)),
    )


def main() -> None:
    images, detections = [*map(int, sys.argv[1:]), *(5_000, 100)[len(sys.argv) - 1 :]]
    tracemalloc.start()

    def allocated() -> str:
        now, peak = (size / 1e6 for size in tracemalloc.get_traced_memory())
        tracemalloc.reset_peak()
        return f'{now:.1f} MB, peak {peak:.1f} MB'

    record = synthetic(images, detections)
    count = 2 * EXITS * images * detections
    print(f'{images} images, {count} detections: arrays {record.nbytes / 1e6:.1f} MB')
    print(f'made: {allocated()}')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'record.npz'
        start = time.process_time()
        write_record(record, path)
        print(f'written: {allocated()}, {time.process_time() - start:.1f} s', end='; ')
        print(f'file {path.stat().st_size / 1e6:.1f} MB')
        del record
        start = time.process_time()
        record = read_record(path)  # noqa: F841  (is what is measured)
        print(f'read: {allocated()}, {time.process_time() - start:.1f} s')


if __name__ == '__main__':
    main()

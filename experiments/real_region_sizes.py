"""Which sizes of both exits, and how many regions, serve best: a plain detector in the place of both exits.

    python experiments/real_region_sizes.py FOLDER ANNOTATIONS --pictures 500 --json FILE

FOLDER is what ``tools/export.py --standalone`` made of a plain detector, ANNOTATIONS a COCO file with absolute names of
pictures. Exit 0 sees them in one size, crops are of another; nothing is trained. Each choice is tried at some prices,
and compared with the plain detector of equal GFLOPs, straight between sizes.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from real_front import truth_of

from dynamicdet import cli
from dynamicdet.deploy.standalone_model import open_standalone
from dynamicdet.deploy.standalone_regions import Detector as RegionDetector
from dynamicdet.files import write_atomically
from dynamicdet.reports.figures import PLAIN_COLOR, png
from dynamicdet.routing.box_merging import Merge
from dynamicdet.routing.class_weights import class_weights
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.record import Detections, RoutingRecord
from dynamicdet.routing.region_record import objects_by_class
from dynamicdet.routing.regions import threshold_of_price

#: Longer sides at which a plain detector sees pictures.
PLAIN = (320, 384, 448, 512, 576, 640, 768)
#: Sizes of exit 0 and of crops.
EXITS = ((320, 640), (384, 768), (448, 896), (448, 1024), (512, 1024))
LIMITS = (1, 2)
#: Gains per cell that a region must have.
PRICES = (0.01, 0.005, 0.0025)
CELL = 32


class TwoSizes(RegionDetector):
    """A plain detector as both exits, each of a size of its own: what `standalone_regions` does with a dynamic one."""

    def __init__(self, plain, weights, sizes, limit):
        self.about, self.sessions = plain.about, plain.sessions * 2
        self.sizes = sizes
        self.settings = dict(
            cell=CELL, halo=1, limit=limit, overhead=0.0, step=1, divisor=CELL, stride=CELL, tile=4096, first_size=None,
            scale=sizes[0] / sizes[1], router=None,
        )  # fmt: skip
        self.merge = Merge.parse('wbf')
        self._class_weights = np.float32(weights)
        self._choice = [self.settings[name] for name in ('halo', 'limit', 'overhead', 'step')]
        self.seen = {}

    def detect(self, picture, key, price):
        """Detections, and pixels that were looked at."""
        self.key, self.picture, self.pixels = key, picture, 0
        image, scale = delivered(picture, self.sizes[1])
        found = self.run(image, scale, picture.shape[:2], threshold_of_price(price))
        return found, self.pixels + self.seen[key][1]

    def _half(self, half, image, scale, original, maps=()):
        if half:
            self.pixels += padded_area(image)
            return super()._half(half, image, scale, original)
        if self.key not in self.seen:
            image, scale = delivered(self.picture, self.sizes[0])
            found = super()._half(0, image, scale, original)
            self.seen[self.key] = found, padded_area(image)
        return self.seen[self.key][0]


def delivered(picture, side):
    """A picture, (3, h, w), with a longer side, and the factors of width and height."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    image = cv2.resize(picture, size).transpose(2, 0, 1)
    return np.ascontiguousarray(image), (size[0] / width, size[1] / height)


def padded_area(image):
    """Pixels that the network sees."""
    height, width = (-(-side // CELL) * CELL for side in image.shape[1:])
    return height * width


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folder', help='standalone export of a plain detector')
    parser.add_argument('annotations', help='COCO file with absolute names of pictures')
    parser.add_argument('--pictures', type=int, default=500, help='the first so many: 500')
    parser.add_argument(
        '--gflops-per-megapixel',
        type=float,
        default=4.83,
        help="of the detector: YOLOX-nano's 4.83",
    )
    parser.add_argument('--json', type=Path, help='all numbers')
    parser.add_argument('--picture', type=Path, help='AP against GFLOPs, PNG')
    args = parser.parse_args()
    cli.prepare()
    cv2.setNumThreads(1)
    plain = open_standalone(args.folder, threads=1)
    truth = read_truth(args.annotations)
    categories = sorted(truth.getCatIds())
    weights = class_weights(objects_by_class(truth, categories))
    images = truth.loadImgs(sorted(truth.getImgIds()))[: args.pictures]
    choices = [(exits, limit) for exits in EXITS for limit in LIMITS]
    detectors = {choice: TwoSizes(plain, weights, *choice) for choice in choices}
    systems = [('plain', side, None) for side in PLAIN]
    systems += [(*choice, price) for choice in choices for price in PRICES]
    detections, pixels = [[] for _ in systems], np.zeros(len(systems))
    for image in cli.progress(images, 'pictures'):
        picture = cv2.imread(image['file_name'])
        for detector in detectors.values():
            detector.seen.clear()
        for row, (kind, limit, price) in enumerate(systems):
            if kind == 'plain':
                inputs, scale = delivered(picture, limit)
                found = plain.run(inputs, scale, picture.shape[:2], None)
                pixels[row] += padded_area(inputs)
            else:
                found, area = detectors[kind, limit].detect(picture, image['id'], price)
                pixels[row] += area
            boxes = np.column_stack([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]])
            detections[row].append((boxes, found.scores, np.array(categories)[found.labels]))
    ids, nothing = np.array([image['id'] for image in images]), [0.0] * len(systems)
    record = RoutingRecord(
        ids, [''] * len(ids), np.zeros(len(ids)), [Detections.join(rows) for rows in detections], nothing, nothing
    )  # fmt: skip
    mixtures = Mixtures(record, truth_of(truth, ids))
    aps = [mixtures.ap(np.full(len(ids), row)) for row in range(len(systems))]
    gflops = pixels / len(ids) / 1e6 * args.gflops_per_megapixel
    front = gflops[: len(PLAIN)], np.maximum.accumulate(aps[: len(PLAIN)])
    rows = [
        dict(
            name=f'plain {system[1]}' if system[0] == 'plain' else f'{system[0][0]}, {system[0][1]}, {system[1]} at most',
            price=system[2], ap=ap, gflops=cost, above=ap - float(np.interp(cost, *front)),
        )
        for system, ap, cost in zip(systems, aps, gflops.tolist())
    ]  # fmt: skip
    for row in rows:
        print('{name:28} {price!s:5} {gflops:.2f} GFLOPs {ap:.2f} AP {above:+.2f}'.format(**row))
    if args.json:
        write_atomically(
            json.dumps(dict(pictures=len(ids), rows=rows), indent=1).encode(), args.json
        )
    if args.picture:
        write_atomically(png(figure_of(rows)), args.picture)


def figure_of(rows):
    """AP against GFLOPs."""
    figure = Figure((6.4, 4.2), dpi=140, layout='constrained')
    axes = figure.add_subplot()
    for name in dict.fromkeys(
        row['name'].split(' ')[0] if row['price'] is None else row['name'] for row in rows
    ):
        some = [row for row in rows if row['name'].startswith(name)]
        style = (
            dict(color=PLAIN_COLOR, marker='D')
            if name == 'plain'
            else dict(marker='o', markersize=4)
        )
        axes.plot([row['gflops'] for row in some], [row['ap'] for row in some], label=name, **style)
    axes.set_xlabel('GFLOPs per picture')
    axes.set_ylabel('AP')
    axes.legend(frameon=False, fontsize=7)
    return figure


if __name__ == '__main__':
    cli.run(main)

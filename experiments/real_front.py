"""AP against milliseconds and GFLOPs: plain and dynamic detectors on the same pictures, in one runtime.

    python experiments/real_front.py prepare DATA OUT [--more FOLDER]
    python experiments/real_front.py measure OUT [--threads 2] [--pictures 200]
    python experiments/real_front.py compare OUT [--json FILE] [--picture FILE]

``prepare`` makes dynamic detectors of published weights by tools/make_dynamic.py, on ``router.json``, and exports them
and the plain ones by tools/export.py --standalone. ``measure`` runs ``test.json``: each picture is detected by all systems in turn, from decoded pixels
to boxes, so what disturbs the machine disturbs all of them; on an idle machine. Both go on where they were stopped.
``compare`` writes the table: AP, milliseconds, GFLOPs, and what each is above the plain detector at equal cost.
"""

import argparse
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from pycocotools.coco import COCO
from real_records import join_annotations
from steps import run

from dynamicdet import cli
from dynamicdet.building import build_model
from dynamicdet.deploy.standalone_model import delivered, open_standalone
from dynamicdet.errors import UsageError
from dynamicdet.files import write_atomically
from dynamicdet.measuring.baselines import at_size
from dynamicdet.measuring.flops import count_flops
from dynamicdet.reports.figures import PLAIN_COLOR, png
from dynamicdet.routing.bootstrap import bootstrap_weights
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.record import Detections, RoutingRecord
from dynamicdet.timing import machine_of, time_call

#: Sides at which plain detectors see pictures.
PLAIN_SIZES = (320, 384, 448, 512, 576, 640, 768)
#: Kinds of dynamic detectors -> sizes of both exits, and shares of hard pictures or of pixels.
KINDS: dict[str, tuple[tuple[int, int], tuple[float, ...]]] = {
    'image': ((320, 640), (0.15, 0.3, 0.5)),
    'regions': ((320, 640), (0.1, 0.2, 0.35)),
    'large regions': ((512, 1024), (0.05, 0.1, 0.15)),
}
MERGE = 'wbf'
_CPU = torch.device('cpu')
#: Pictures of a part, bootstrap resamples of the pictures, and their seed.
PART, RESAMPLES, SEED = 25, 300, 0
#: Name -> config, and weights in the folder of data.
DETECTORS = dict(
    yolox_nano=('mmdet::yolox/yolox_nano_8xb8-300e_coco.py', 'weights/yolox_nano_mmdet.pth'),
    yolov5_n=('configs/yolov5_n.py', 'weights/yolov5n.pt'),
)
#: A small and a large one of them as exits, where both are compared.
PAIR = ('yolox_nano', 'yolov5_n')
#: How kinds are called and drawn.
STYLES = {
    'plain': ('plain, seven sizes', dict(marker='D', color=PLAIN_COLOR)),
    'image': ('routed by image, 320 and 640', dict(marker='o', color='#0072b2')),
    'regions': ('regions, 320 and 640', dict(marker='s', color='#009e73')),
    'large regions': ('regions, 512 and 1,024', dict(marker='^', color='#d55e00')),
}


class System(NamedTuple):
    """A detector as it is used.

    Attributes:
        detector (str): Whose plain sizes it is compared with; 'pair': those of both.
        kind (str): 'plain', or what is dynamic.
        size (int): Longer side of the delivered picture, pixels.
        hard_share (float, optional): Of pictures, of regions the share of pixels.
    """

    detector: str
    kind: str
    size: int
    hard_share: float | None = None

    @property
    def name(self) -> str:
        """Such as 'yolox_nano plain 416'."""
        return f'{self.detector} {self.kind} {self.size if self.hard_share is None else self.hard_share}'

    @property
    def folder(self) -> str:
        """Of its export."""
        return f'{self.detector}_{self.kind.replace(" ", "_")}'


def systems_of(detectors: Sequence[str]) -> list[System]:
    """All that is compared."""
    systems = []
    for name in detectors:
        systems += [System(name, 'plain', size) for size in PLAIN_SIZES]
        for kind, (sizes, shares) in KINDS.items():
            systems += [System(name, kind, max(sizes), share) for share in shares]
    if set(PAIR) <= set(detectors):
        sizes, shares = KINDS['image']
        systems += [System('pair', 'image', max(sizes), share) for share in shares]
    return systems


# Prepare.


def prepare(args: argparse.Namespace) -> None:
    """Make and export what is not there yet."""
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ('router', 'test'):
        path = args.out / f'{split}.json'
        if not path.exists():
            write_atomically(
                json.dumps(join_annotations(args.data, split, args.more)).encode(), path
            )
    plain = {}
    for name in args.detectors:
        config, weights = args.out / f'{name}.py', args.data / DETECTORS[name][1]
        if not config.exists():
            plain_config(name, args.out / 'test.json').dump(config)
        if name == 'yolov5_n':
            weights = converted(args, config)
        plain[name] = [str(config), str(weights)]
        export(args, config, weights, f'{name}_plain')
        for kind, (sizes, _) in KINDS.items():
            make_dynamic(args, System(name, kind, max(sizes)).folder, plain[name], kind)
    if set(PAIR) <= set(plain):
        make_dynamic(args, 'pair_image', [part for name in PAIR for part in plain[name]], 'image')


def make_dynamic(args: argparse.Namespace, name: str, detectors: Sequence[str], kind: str) -> None:
    """By the tool, and exported."""
    made, sizes = args.out / f'{name}.pth', map(str, KINDS[kind][0])
    looks = ['--regions=1', f'--merge={MERGE}'] if 'regions' in kind else ['--sees=maps']
    if not made.exists():
        run(
            'tools/make_dynamic.py', *detectors, f'--data={args.out}',
            f'--ann={args.out / "router.json"}', '--img=/', '--exits', *sizes,
            f'--out={made}', '--view=none', *looks, log=args.out / f'{name}.log',
        )  # fmt: skip
    export(args, made.with_suffix('.py'), made, name)
    print(f'{name}: ready', flush=True)


def plain_config(name: str, ann_file: Path) -> Config:
    """The stock detector's config; pictures are padded to multiples of 32 pixels alone."""
    cfg = cli.read_config(DETECTORS[name][0])
    cfg.model.data_preprocessor.pop('batch_augments', None)
    for split in ('val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=1, num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root='', ann_file=str(ann_file), data_prefix=dict(img=''))
        for step in loader.dataset.pipeline:
            if step.type == 'Pad':
                step.pop('pad_to_square', None)
                step.pop('size', None)
                step.size_divisor = 32
        cfg[f'{split}_evaluator'].ann_file = str(ann_file)
    return cfg


def converted(args: argparse.Namespace, config: Path) -> Path:
    """YOLOv5's published weights under this project's names."""
    path = args.out / 'yolov5_n_plain.pth'
    if not path.exists():
        run(
            'tools/convert_checkpoint.py', str(args.data / DETECTORS['yolov5_n'][1]),
            f'--out={path}', '--from=yolov5', f'--config={config}', log=args.out / 'convert.log',
        )  # fmt: skip
    return path


def export(args: argparse.Namespace, config: Path, weights: Path, name: str) -> None:
    """A folder that runs without this project."""
    folder = exported(args, name)
    if not (folder / 'detector.json').exists():
        run(
            'tools/export.py', str(config), str(weights), f'--out={folder}', '--standalone',
            log=args.out / 'export.log',
        )  # fmt: skip


def exported(args: argparse.Namespace, name: str) -> Path:
    """The folder of a detector's export."""
    return args.out / 'exported' / name


# Measure.


class Loaded(NamedTuple):
    """A system, ready: its detector, what brings a picture into its form, and its threshold."""

    system: System
    detector: Any
    pipeline: Compose
    threshold: float | None


def load_systems(args: argparse.Namespace) -> list[Loaded]:
    """Each folder once, however many budgets it has."""
    detectors: dict[str, Any] = {}
    loaded = []
    for system in systems_of(args.detectors):
        if system.folder not in detectors:
            detectors[system.folder] = open_standalone(
                str(exported(args, system.folder)), args.threads
            )
        detector = detectors[system.folder]
        cfg = cli.read_config(str(args.out / f'{args.detectors[0]}.py'))
        # The picture is decoded already.
        steps = at_size(cfg.test_dataloader.dataset.pipeline, system.size)[1:]
        threshold = None
        if system.hard_share is not None:
            threshold = detector.threshold_for(hard_share=system.hard_share)
        loaded.append(Loaded(system, detector, Compose(steps), threshold))
    return loaded


def detect(loaded: Loaded, picture: np.ndarray, image: dict):
    """What a system finds in a picture, (H, W, 3) uint8, and height and width as delivered."""
    inputs = dict(
        img=picture, img_shape=picture.shape[:2], ori_shape=picture.shape[:2],
        img_id=image['id'], img_path=image['file_name'],
    )  # fmt: skip
    given = delivered(loaded.pipeline(inputs))
    return loaded.detector.run(*given, loaded.threshold), given


def measure(args: argparse.Namespace) -> None:
    """Write parts that are not there yet."""
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    truth, images = pictures_of(args)
    systems, categories = load_systems(args), sorted(truth.getCatIds())
    folder = folder_of(args)
    folder.mkdir(parents=True, exist_ok=True)
    facts = dict(machine_of('cpu', args.threads), runtime='onnxruntime')
    write_atomically(json.dumps(facts).encode(), folder / 'machine.json')
    for begin in cli.progress(range(0, len(images), PART), 'parts'):
        path = folder / f'{begin:05}.npz'
        if path.exists():
            continue
        seconds, cells, rows = [], [], []
        for at, image in enumerate(images[begin : begin + PART]):
            picture = cv2.imread(image['file_name'])
            # Who comes first changes, and one untimed call warms up.
            order = np.roll(np.arange(len(systems)), -at)
            if at == 0:
                for entry in systems:
                    detect(entry, picture, image)
            timed = {}
            for index in order:
                entry = systems[index]
                timed[index] = time_call(lambda: detect(entry, picture, image), _CPU)
            seconds.append([timed[index][0] for index in range(len(systems))])
            found = [timed[index][1] for index in range(len(systems))]
            cells.append([looked_at(*one) for one in found])
            rows += [arrays_of_found(one, categories) for one, _ in found]
        content = dict(
            vars(Detections.join(rows)), seconds=np.array(seconds), cells=np.array(cells)
        )
        file = io.BytesIO()
        np.savez(file, **content)
        write_atomically(file.getvalue(), path)


def folder_of(args: argparse.Namespace) -> Path:
    """Of what was measured in a runtime."""
    return args.out / f'measured_{args.threads}'


def pictures_of(args: argparse.Namespace) -> tuple[COCO, list[dict]]:
    """The annotations, and the entries of the pictures that are measured."""
    truth = read_truth(str(args.out / 'test.json'))
    return truth, truth.loadImgs(sorted(truth.getImgIds()))[: args.pictures]


def arrays_of_found(found, categories: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Boxes, (D, 4), left, top, width, height; scores; categories."""
    boxes = np.column_stack([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]])
    return boxes, found.scores, np.array(categories)[found.labels]


def looked_at(found, given: tuple) -> tuple[float, float, float]:
    """The network's height and width of a picture, and pixels that the second exit saw, as it sees
    them."""
    picture, (wide, high), _ = given
    height, width = map(_up, picture.shape[1:])
    again = height * width if found.exit else 0
    if getattr(found, 'regions', None):
        again = sum(
            _up(right * wide - left * wide) * _up(bottom * high - top * high)
            for left, top, right, bottom in found.regions
        )
    return height, width, again


def _up(side: float) -> float:
    return -(-round(side) // 32) * 32


# Compare.


class Measured(NamedTuple):
    """n pictures by k systems: detections by system, and (n, k) seconds and GFLOPs."""

    detections: list[Detections]
    seconds: np.ndarray
    gflops: np.ndarray


def read_parts(args: argparse.Namespace, systems: Sequence[System], pictures: int) -> Measured:
    """What was measured.

    Raises:
        UsageError: If some of it is missing.
    """
    rows: list[list] = [[] for _ in systems]
    parts = []
    for begin in range(0, pictures, PART):
        path = folder_of(args) / f'{begin:05}.npz'
        if not path.is_file():
            raise UsageError(f"'{path}' is missing: run `measure` to its end first")
        with np.load(path) as file:
            part = {name: file[name] for name in file.files}
        detections = Detections(
            *(part[name] for name in ('boxes', 'scores', 'categories', 'offsets'))
        )
        for index in range(len(systems)):
            of_system = detections.take(np.arange(index, len(detections), len(systems)))
            rows[index] += [arrays_of(of_system, row) for row in range(len(of_system))]
        parts.append(part)
    seconds, cells = (
        np.concatenate([part[name] for part in parts]) for name in ('seconds', 'cells')
    )
    per_pixel = {name: gflops_per_pixel(args, name) for name in args.detectors}
    gflops = []
    for index, system in enumerate(systems):
        exits = PAIR if system.detector == 'pair' else [system.detector] * 2
        gflops.append(gflops_of(system, cells[:, index], [per_pixel[name] for name in exits]))
    return Measured([Detections.join(of_system) for of_system in rows], seconds, np.array(gflops).T)


def arrays_of(detections: Detections, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and categories of a picture."""
    rows = detections.rows(row)
    return detections.boxes[rows], detections.scores[rows], detections.categories[rows]


@torch.no_grad()
def gflops_per_pixel(args: argparse.Namespace, name: str) -> float:
    """Of a plain detector, whose convolutions cost the same everywhere."""
    cfg = cli.read_config(str(args.out / f'{name}.py'))
    model, side = build_model(cfg).eval(), 640
    flops, _ = count_flops(lambda: model(torch.zeros(1, 3, side, side), mode='tensor'))
    return flops / 1e9 / side**2


def gflops_of(system: System, cells: np.ndarray, per_pixel: Sequence[float]) -> np.ndarray:
    """Of each picture, (n,), by what was looked at, (n, 3), see `looked_at`, and what a pixel costs
    at each exit."""
    height, width, again = cells.T
    if system.kind == 'plain':
        return per_pixel[0] * height * width
    small, large = KINDS[system.kind][0]
    first = [np.maximum(1, np.round(side * small / large / 32)) * 32 for side in (height, width)]
    return per_pixel[0] * first[0] * first[1] + per_pixel[1] * again


def compare(args: argparse.Namespace) -> None:
    """Print the table, and write all numbers."""
    truth, images = pictures_of(args)
    systems = systems_of(args.detectors)
    measured = read_parts(args, systems, len(images))
    ids = np.array([image['id'] for image in images])
    nothing = [0.0] * len(systems)
    record = RoutingRecord(
        ids,
        [image['file_name'] for image in images],
        np.zeros(len(ids)),
        measured.detections,
        nothing,
        nothing,
    )
    mixtures = Mixtures(record, truth_of(truth, ids))
    draws = np.vstack([np.ones((1, len(ids)), int), bootstrap_weights(len(ids), RESAMPLES, SEED)])
    aps = np.array(
        [
            [mixtures.ap(np.full(len(ids), index), draw) for index in range(len(systems))]
            for draw in draws
        ]
    )
    milliseconds, gflops = (
        draws @ values / len(ids) for values in (1e3 * measured.seconds, measured.gflops)
    )
    rows = []
    for index, system in enumerate(systems):
        row = dict(
            name=system.name, kind=system.kind, detector=system.detector, ap=aps[0, index],
            milliseconds=milliseconds[0, index], gflops=gflops[0, index],
            median_milliseconds=1e3 * float(np.median(measured.seconds[:, index])),
        )  # fmt: skip
        if system.kind != 'plain':
            front = [
                at
                for at, other in enumerate(systems)
                if other.kind == 'plain' and system.detector in (other.detector, 'pair')
            ]
            for name, costs in (
                ('above_at_equal_time', milliseconds),
                ('above_at_equal_gflops', gflops),
            ):
                row[name] = above(aps, costs, front, index)
        rows.append(row)
    facts = json.loads((folder_of(args) / 'machine.json').read_text())
    about = dict(facts, pictures=len(ids), resamples=RESAMPLES, seed=SEED)
    for line in table(rows):
        print(line)
    if args.json:
        write_atomically(json.dumps(dict(about, systems=rows), indent=1).encode(), args.json)
    if args.picture:
        write_atomically(png(figure_of(rows)), args.picture)


def above(aps: np.ndarray, costs: np.ndarray, front: Sequence[int], index: int) -> list[float]:
    """AP of a system less that of the plain detector at equal cost, straight between sizes, and its 95 % interval.
    Beyond the largest size it is the largest's."""
    more = []
    for ap, cost in zip(aps, costs):
        order = sorted(front, key=lambda at: cost[at])
        # More for more time: a size that is slower and worse than another is no point of the front.
        best = np.maximum.accumulate(ap[order])
        more.append(ap[index] - np.interp(cost[index], cost[order], best))
    return [float(value) for value in (more[0], *np.percentile(more[1:], (2.5, 97.5)))]


def figure_of(rows: Sequence[dict]) -> Figure:
    """AP against milliseconds, and against GFLOPs: of the first detector."""
    figure = Figure((9.6, 4.2), dpi=140, layout='constrained')
    detector = rows[0]['detector']
    for axes, (cost, label) in zip(
        figure.subplots(1, 2, sharey=True),
        (('milliseconds', 'ms per picture'), ('gflops', 'GFLOPs per picture')),
    ):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(color='#dddddd', linewidth=0.7)
        for kind, (said, style) in STYLES.items():
            points = [row for row in rows if (row['detector'], row['kind']) == (detector, kind)]
            axes.plot(
                [row[cost] for row in points], [row['ap'] for row in points], label=said, **style
            )
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel('AP')
    figure.axes[1].legend(frameon=False, loc='lower right')
    return figure


def table(rows: Sequence[dict]) -> list[str]:
    """Of Markdown."""
    lines = [
        '| | ms | GFLOPs | AP | at equal time | at equal GFLOPs |',
        '|---|---|---|---|---|---|',
    ]
    for row in rows:
        more = [
            '{:+.1f} ({:.1f} to {:.1f})'.format(*row[name]) if name in row else ''
            for name in ('above_at_equal_time', 'above_at_equal_gflops')
        ]
        lines.append(
            f'| {row["name"]} | {row["milliseconds"]:.1f} | {row["gflops"]:.2f} | {row["ap"]:.1f} | {" | ".join(more)} |'
        )
    return lines


def truth_of(truth: COCO, ids: np.ndarray) -> COCO:
    """The annotations of some of the pictures."""
    if len(ids) == len(truth.imgs):
        return truth
    known = set(ids.tolist())
    content = dict(
        images=[image for image in truth.dataset['images'] if image['id'] in known],
        annotations=[entry for entry in truth.dataset['annotations'] if entry['image_id'] in known],
        categories=truth.dataset['categories'],
    )
    with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
        json.dump(content, file)
        file.flush()
        return read_truth(file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    for function in (prepare, measure, compare):
        command = commands.add_parser(function.__name__, help=function.__doc__.split('\n')[0])
        command.set_defaults(function=function)
        if function is prepare:
            command.add_argument('data', type=absolute, help='folder with coco/ and weights/')
            command.add_argument(
                '--more', type=absolute, help='folder with more pictures of COCO val2017'
            )
        command.add_argument('out', type=absolute, help='folder of detectors and results')
        command.add_argument('--detectors', nargs='+', choices=DETECTORS, default=list(DETECTORS))
        if function is not prepare:
            command.add_argument('--threads', type=int, default=1, help='of the runtime: 1')
            command.add_argument('--pictures', type=int, help='the first so many; all')
        if function is compare:
            command.add_argument('--json', type=Path, help='all numbers')
            command.add_argument('--picture', type=Path, help='AP against both costs, PNG')
    args = parser.parse_args()
    cli.prepare()
    init_default_scope('mmdet')
    args.function(args)


def absolute(path: str) -> Path:
    """Tools run in the repository's root."""
    return Path(path).resolve()


if __name__ == '__main__':
    cli.run(main)

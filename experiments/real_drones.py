"""Films with regions: AP against GFLOPs and time, beside a plain detector at three sizes.

    python experiments/real_drones.py train --data DATA --work WORK
    python experiments/real_drones.py measure --data DATA --work WORK
    python experiments/real_drones.py draw --data DATA --work WORK

DATA is a folder with ``drones/`` (40 films) and ``weights/``. YOLOX-nano with published weights is
fine-tuned to the four classes on frames of the 20 train films; settings are chosen on 8, and 12 are
looked at last. Each step leaves its result in WORK, and is not done again. Seed 0.
"""

import argparse
import contextlib
import copy
import io
import json
import time
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.registry import init_default_scope
from pycocotools.coco import COCO
from real_tuning import Picture, nano, tune

import dynamicdet.video  # noqa: F401  (registers)
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.files import write_atomically
from dynamicdet.measuring.calibration import detection_arrays
from dynamicdet.measuring.flops import count_flops
from dynamicdet.models import fuse
from dynamicdet.reports.figures import PLAIN_COLOR, png
from dynamicdet.routing.evaluation import Mixtures, evaluate, mixed_results
from dynamicdet.routing.record import Detections, RoutingRecord
from dynamicdet.routing.regions import grid_of
from dynamicdet.video.film_stakes import spans_of
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

CLASSES = ('airplane', 'bird', 'drone', 'helicopter')
#: Classes of COCO from which the classifier of each begins; neither drones nor helicopters are there.
#: Places in COCO's list of 80: airplane, bird, kite, airplane.
BEGIN = (4, 14, 33, 4)
#: Every so many frames of a train film are trained on.
TRAIN_STEP = 7
SEED = 0
#: Of val and test films every so many frames are looked at: 15 per second.
STEP = 2
#: So many of these are looked at, of each film the first.
MOST = dict(val=40, test=80)
#: Most GFLOPs of each budget, as a share of the plain detector's at full size.
BUDGETS = dict(high=0.35, middle=0.2, low=0.1)
CHOSEN = tuple(f'films, {budget}' for budget in BUDGETS)
#: Widths at which the plain detector sees each frame.
SIZES = (640, 416, 320)
#: Of the bootstrap; frames of each film that are timed; noise of a still film's sensor, in gray levels,
#: and its frames.
RESAMPLES, TIMED, NOISE, STILL = 500, 12, 2.0, 20
#: Width of the delivered frame, and how much of it exit 0 sees.
DELIVERED, FIRST_SCALE = 640, 0.5


def films_of(data: Path, split: str) -> dict[str, dict]:
    """Name and annotations of the films of a split."""
    every = json.loads((data / 'drones' / 'annotations.json').read_text())
    assert tuple(every['classes']) == CLASSES
    return {name: film for name, film in every['videos'].items() if film['split'] == split}


def frames_of(path: Path):
    """Frames of a film in their order, (H, W, 3), uint8, BGR."""
    with av.open(str(path)) as film:
        for frame in film.decode(video=0):
            yield frame.to_ndarray(format='bgr24')


def train(args: argparse.Namespace) -> None:
    """The plain detector, fine-tuned on crops of the train films' frames at all sizes."""
    if plain_path(args).exists():
        return
    frames = []
    for name, film in films_of(args.data, 'train').items():
        for number, picture in enumerate(frames_of(args.data / 'drones' / name)):
            if number % TRAIN_STEP or number >= len(film['boxes']):
                continue
            rows = np.array(film['boxes'][number], float).reshape(-1, 5)
            boxes = np.hstack([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:]])
            frames.append((picture, boxes, rows[:, 0].astype(int)))

    def draw(random: np.random.Generator) -> Picture:
        return frames[random.integers(len(frames))]

    tune(
        args.data / 'weights' / 'yolox_nano_mmdet.pth',
        BEGIN,
        CLASSES,
        draw,
        plain_path(args),
        steps=args.steps,
        seed=SEED,
        least=round(DELIVERED * FIRST_SCALE),
    )


def plain_path(args: argparse.Namespace) -> Path:
    """Of the fine-tuned detector."""
    return args.work / 'plain.pth'


# What is compared.


class Setting(NamedTuple):
    """A detector, and the frames that it sees.

    Attributes:
        size (int): Width of the delivered frame.
        film (dict, optional): Arguments of `FilmDetector`; None for the plain detector.
        threshold (float): Its price.
        oracle (bool): Whether regions are where objects are.
    """

    size: int = DELIVERED
    film: dict | None = None
    threshold: float = 0.0
    oracle: bool = False


class Result(NamedTuple):
    """Detections of each frame, GFLOPs of each, (n,), and exits, (n,)."""

    detections: Detections
    gflops: np.ndarray
    exits: np.ndarray


def build(args: argparse.Namespace, setting: Setting) -> torch.nn.Module:
    """The detector of a setting, fused, as tools run it."""
    detector = nano(len(CLASSES))
    if setting.film is not None:
        film = dict(setting.film)
        detector = dict(
            type='FilmDetector',
            detector=detector,
            backbone=detector.backbone,
            backbones=1,
            reuse_stages=0,
            shared=True,
            first_scale=FIRST_SCALE,
            regions=dict(halo=film.pop('halo', 1)),
            budget=dict(threshold=setting.threshold),
            **film,
        )
    model = MODELS.build(detector)
    model.load_state_dict(read_checkpoint(str(plain_path(args)))['state_dict'], strict=False)
    return fuse(model.eval())


def deliver(picture: np.ndarray, size: int, film: str, number: int, identity: int) -> dict:
    """A frame as a test pipeline delivers it, at a width."""
    height, width = picture.shape[:2]
    shape = round(height * size / width), size
    if size != width:
        picture = cv2.resize(picture, shape[::-1], interpolation=cv2.INTER_LINEAR)
    sample = DetDataSample(
        metainfo=dict(
            img_id=identity,
            ori_shape=(height, width),
            img_shape=shape,
            scale_factor=(size / width, shape[0] / height),
            video_id=film,
            frame_id=number,
        )
    )
    image = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
    return dict(inputs=[image], data_samples=[sample])


def frames_of_split(args: argparse.Namespace, split: str, most: int):
    """Film, number, picture and boxes of every `STEP`-th frame of a split, the films' first
    ``most``."""
    for name, film in films_of(args.data, split).items():
        for number, picture in enumerate(frames_of(args.data / 'drones' / name)):
            if number >= min(most * STEP, len(film['boxes'])):
                break
            if number % STEP == 0:
                yield name, number // STEP, picture, film['boxes'][number]


def truth_of(
    args: argparse.Namespace, split: str, most: int | None = None
) -> tuple[COCO, list[str]]:
    """Objects of the frames, whose ids count from 1, and the film of each."""
    images, annotations, names = [], [], []
    for name, film in films_of(args.data, split).items():
        for number in list(range(0, len(film['boxes']), STEP))[: MOST[split]]:
            names.append(name)
            images.append(dict(id=len(names), width=film['width'], height=film['height']))
            for label, *box in film['boxes'][number]:
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=len(names),
                        category_id=label + 1,
                        bbox=box,
                        area=box[2] * box[3],
                        iscrowd=0,
                    )
                )
    coco = COCO()
    coco.dataset = dict(
        images=images,
        annotations=annotations,
        categories=[dict(id=place + 1, name=name) for place, name in enumerate(CLASSES)],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco, names


@torch.no_grad()
def run(args: argparse.Namespace, split: str, setting: Setting) -> Result:
    """A setting on a split, frame by frame; from its file where that is there."""
    parts = [setting.size, *sum((setting.film or {}).items(), ()), setting.threshold]
    name = '_'.join(map(str, [*parts, *['oracle'] * setting.oracle]))
    path = args.work / 'results' / f'{split}_{MOST[split]}_{name}.npz'
    if path.exists():
        with np.load(path) as file:
            parts = {key: file[key] for key in ('boxes', 'scores', 'categories', 'offsets')}
            return Result(Detections(**parts), file['gflops'], file['exits'])
    model, rows, gflops, exits, plain = build(args, setting), [], [], [], None
    for identity, (film, number, picture, boxes) in enumerate(
        frames_of_split(args, split, MOST[split]), 1
    ):
        data = deliver(picture, setting.size, film, number, identity)
        if setting.oracle:
            look_at(model, boxes)
        if setting.film is None and plain is None:
            plain = count_flops(lambda: model.test_step(copy.deepcopy(data)))[0] / 1e9
        (sample,) = model.test_step(data)
        rows += detection_arrays([sample], range(1, len(CLASSES) + 1))
        gflops.append(sample.get('gflops', plain))
        exits.append(sample.get('exit', 1))
    result = Result(Detections.join(rows), np.array(gflops), np.array(exits))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        lambda file: np.savez(file, gflops=gflops, exits=exits, **vars(result.detections)), path
    )
    return result


def look_at(model: torch.nn.Module, boxes: list) -> None:
    """Let regions of the next frame be where its objects are."""
    grid = grid_of(512, 640)
    corners = np.array([[x, y, x + w, y + h] for _, x, y, w, h in boxes]).reshape(-1, 4)
    chosen = [tuple(span) for span in spans_of(corners, grid, 32).tolist()]
    model.regions.choose = lambda gains, threshold: chosen[:2]


def repeated(result: Result, names: list[str], every: int) -> Result:
    """Plain detections of every n-th frame of a film, the others repeat them: nothing runs."""
    rows, gflops, numbers = [], [], {}
    for row, name in enumerate(names):
        number = numbers[name] = numbers.get(name, -1) + 1
        rows.append(row - number % every)
        gflops.append(0.0 if number % every else result.gflops[row])
    detections = result.detections
    parts = [detections.rows(row) for row in rows]
    columns = [
        (detections.boxes[part], detections.scores[part], detections.categories[part])
        for part in parts
    ]
    return Result(Detections.join(columns), np.array(gflops), result.exits)


# Figures.


def judge(
    results: dict[str, Result], coco: COCO, names: list[str], resamples: int
) -> dict[str, dict]:
    """Of each result AP, AP50, mean GFLOPs, and how far AP is from the first result's, with a 95 %
    interval over films, drawn anew within their class."""
    count, every = len(names), [result.detections for result in results.values()]
    ids = np.arange(1, count + 1)
    nothing = [0.0] * len(every)
    record = RoutingRecord(ids, [''] * count, np.zeros(count), every, nothing, nothing, {})
    mixtures = Mixtures(record, coco)
    weights = np.concatenate([np.ones((1, count), np.int64), film_weights(names, resamples)])
    aps = np.array(
        [[mixtures.ap(np.full(count, k), draw) for draw in weights] for k in range(len(every))]
    )
    figures = {}
    for k, (name, result) in enumerate(results.items()):
        less = aps[k] - aps[0]
        low, high = np.percentile(less[1:], (2.5, 97.5)) if resamples else (0, 0)
        scores = evaluate(coco, mixed_results(record, np.full(count, k)))
        figures[name] = dict(
            ap=float(aps[k, 0]),
            ap50=scores['ap50'],
            gflops=float(result.gflops.mean()),
            above=(float(less[0]), float(low), float(high)),
            exits={str(exit): float((result.exits == exit).mean()) for exit in (-1, 0, 1)},
        )
    return figures


def film_weights(names: list[str], resamples: int) -> np.ndarray:
    """How often each frame counts, (B, n): films are drawn with replacement, within their class."""
    generator, films = np.random.default_rng(SEED), sorted(set(names))
    kinds: dict[str, list[str]] = {}
    for film in films:
        kinds.setdefault(film.split('_')[1], []).append(film)
    place = np.array([films.index(name) for name in names])
    draws = np.zeros((resamples, len(films)), np.int64)
    for group in kinds.values():
        columns = [films.index(film) for film in group]
        draws[:, columns] = generator.multinomial(
            len(group), [1 / len(group)] * len(group), resamples
        )
    return draws[:, place]


@torch.no_grad()
def clock(args: argparse.Namespace, settings: dict[str, Setting], frames: int) -> dict[str, dict]:
    """Seconds per frame, from picture to boxes: all settings on each frame in turn, of each test film
    its first frames. Of the clock the median, and of the processor, which others do not disturb, the
    mean."""
    models = {name: build(args, setting) for name, setting in settings.items()}
    times = {name: [] for name in settings}
    for film, number, picture, _ in frames_of_split(args, 'test', frames):
        for name, setting in settings.items():
            data = deliver(picture, setting.size, film, number, 1)
            start = time.perf_counter(), time.process_time()
            models[name].test_step(data)
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    # The first film warms up, and counts operations.
    rows = {name: np.array(group)[frames:] for name, group in times.items()}
    return {
        name: dict(
            median=float(np.median(group[:, 0])),
            mean=float(group[:, 0].mean()),
            processor=float(group[:, 1].mean()),
        )
        for name, group in rows.items()
    }


@torch.no_grad()
def still(args: argparse.Namespace, settings: dict[str, Setting]) -> dict[str, dict]:
    """The first picture of each test film as a film of its own, with other noise in each frame: mean
    GFLOPs and seconds of the processor per frame, its first frame left out."""
    figures = {}
    for name, setting in settings.items():
        model, generator, rows = build(args, setting), np.random.default_rng(SEED), []
        for film in films_of(args.data, 'test'):
            picture = next(frames_of(args.data / 'drones' / film))
            for number in range(STILL):
                noise = generator.normal(0, NOISE, picture.shape)
                noisy = np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)
                data = deliver(noisy, setting.size, film, number, 1)
                start = time.process_time()
                (sample,) = model.test_step(data)
                rows.append((number, sample.get('gflops', 0.0), time.process_time() - start))
        every = np.array(rows)[STILL:]
        later = every[every[:, 0] > 0]
        figures[name] = dict(processor=float(later[:, 2].mean()))
        if setting.film is not None:
            figures[name]['gflops'] = float(later[:, 1].mean())
    return figures


# From films to figures.


def grid() -> dict[str, Setting]:
    """What is tried on the val films."""
    tried = [
        (dict(whole_exit=exit, every=every, change=change), price)
        for exit in (0, 1)
        for every, change, price in (
            (5, 3.0, 0.02),
            (10, 3.0, 0.02),
            (20, 3.0, 0.02),
            (20, 3.0, 0.1),
            (20, 6.0, 0.1),
            (40, 6.0, 0.1),
        )
    ]
    return {
        ' '.join(f'{key}={value}' for key, value in film.items()) + f' price={price}': Setting(
            film=film, threshold=price
        )
        for film, price in tried
    }


def choose(args: argparse.Namespace) -> tuple[dict[str, Setting], dict]:
    """On the val films: the setting of highest AP within each budget, and all figures."""
    coco, names = truth_of(args, 'val')
    every = {'plain 640': Setting(), **grid()}
    results = {}
    for name, setting in every.items():
        results[name] = run(args, 'val', setting)
        print(name, flush=True)
    figures = judge(results, coco, names, 0)
    for line in lines_of(figures):
        print(line, flush=True)
    full, chosen = figures['plain 640']['gflops'], {}
    for budget, share in BUDGETS.items():
        within = [name for name in grid() if figures[name]['gflops'] <= share * full]
        if within:
            chosen[budget] = max(within, key=lambda name: figures[name]['ap'])
    return {f'films, {budget}': every[name] for budget, name in chosen.items()}, dict(
        figures=figures, chosen=chosen
    )


def measure(args: argparse.Namespace) -> None:
    """All figures, the test films last."""
    chosen, val = choose(args)
    coco, names = truth_of(args, 'test')
    plain = {f'plain {size}': Setting(size) for size in SIZES}
    first = next(iter(chosen.values()))
    oracle = {'films, regions at the objects': first._replace(oracle=True, threshold=0.5)}
    results = {}
    for name, setting in {**plain, **chosen, **oracle}.items():
        results[name] = run(args, 'test', setting)
        print(name, flush=True)
    for every in (3, 5, 10):
        results[f'plain 640, every {every}th frame'] = repeated(results['plain 640'], names, every)
    figures = judge(results, coco, names, RESAMPLES)
    by_class = {
        kind: judge_films(results, coco, names, kind)
        for kind in sorted({name.split('_')[1] for name in names})
    }
    for line in lines_of(figures):
        print(line, flush=True)
    seconds = clock(args, {**plain, **chosen}, TIMED)
    quiet = still(args, {'plain 640': Setting(), **chosen})
    print(json.dumps(dict(seconds=seconds, still=quiet, by_class=by_class), indent=1))
    summary = dict(
        frames=len(names),
        step=STEP,
        val=val,
        test=figures,
        by_class=by_class,
        seconds=seconds,
        still=quiet,
        torch=torch.__version__,
    )
    write_atomically(json.dumps(summary, indent=1).encode() + b'\n', args.out)


def judge_films(
    results: dict[str, Result], coco: COCO, names: list[str], kind: str
) -> dict[str, float]:
    """AP of each result on the films of one class."""
    rows = [row for row, name in enumerate(names) if name.split('_')[1] == kind]
    ids = [row + 1 for row in rows]
    return {
        name: evaluate(
            coco,
            [dict(item, image_id=row + 1) for row in rows for item in result.detections[row]],
            ids,
        )['ap']
        for name, result in results.items()
    }


def lines_of(figures: dict[str, dict]) -> list[str]:
    """A table."""
    lines = [
        '| | GFLOPs | AP | AP50 | above the first | exits -1, 0, 1 |',
        '|---|---|---|---|---|---|',
    ]
    for name, group in figures.items():
        above = '{:+.1f} ({:+.1f} to {:+.1f})'.format(*group['above'])
        exits = ' / '.join(f'{share:.0%}' for share in group['exits'].values())
        lines.append(
            f'| {name} | {group["gflops"]:.3f} | {group["ap"]:.1f} | {group["ap50"]:.1f} | {above} | {exits} |'
        )
    return lines


def cost_of(name: str, summary: dict, label: str) -> float:
    """Mean milliseconds or GFLOPs of a frame. A frame that repeats the one before takes no time."""
    gflops = summary['test'][name]['gflops']
    if label == 'GFLOPs':
        return gflops
    if name in summary['seconds']:
        return 1e3 * summary['seconds'][name]['mean']
    return cost_of('plain 640', summary, label) * gflops / summary['test']['plain 640']['gflops']


def draw(args: argparse.Namespace) -> None:
    """AP against milliseconds and GFLOPs per frame, from the figures."""
    summary = json.loads(args.out.read_text())
    kinds = {
        'plain, each frame': (
            lambda name: name in summary['seconds'] and name not in CHOSEN,
            'D',
            PLAIN_COLOR,
        ),
        'plain at 640, every nth frame': (lambda name: name.endswith('th frame'), 'v', '#e69f00'),
        'regions over time': (lambda name: name in CHOSEN, 's', '#009e73'),
    }
    figure = Figure((9.6, 4.2), dpi=140, layout='constrained')
    for axes, label in zip(figure.subplots(1, 2, sharey=True), ('ms', 'GFLOPs')):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(color='#dddddd', linewidth=0.7)
        for said, (belongs, marker, color) in kinds.items():
            points = [
                (cost_of(name, summary, label), group['ap'])
                for name, group in summary['test'].items()
                if belongs(name)
            ]
            axes.plot(*zip(*sorted(points)), marker=marker, color=color, label=said)
        axes.set_xlabel(f'{label} per frame')
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel('AP')
    figure.axes[1].legend(frameon=False, loc='lower right')
    write_atomically(png(figure), args.picture)


def main() -> None:
    """Train, measure or draw."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('step', choices=('train', 'measure', 'draw'))
    parser.add_argument('--data', type=Path, required=True, help='folder with drones/ and weights/')
    parser.add_argument(
        '--work', type=Path, required=True, help='folder for frames, weights and results'
    )
    parser.add_argument('--steps', type=int, default=600, help='of training, of 8 crops: 600')
    parser.add_argument('--picture', type=Path, default=Path('docs/images/real_films.png'))
    parser.add_argument('--out', type=Path, default=Path('experiments/results/real_drones.json'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    args.work.mkdir(parents=True, exist_ok=True)
    dict(train=train, measure=measure, draw=draw)[args.step](args)


if __name__ == '__main__':
    main()

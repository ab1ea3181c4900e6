"""Films with regions: AP against GFLOPs and time, beside a plain detector at three sizes.

    python experiments/real_drones.py train --data DATA --work WORK
    python experiments/real_drones.py measure --data DATA --work WORK

DATA is a folder with ``drones/`` (40 films) and ``weights/``. YOLOX-nano with published weights is
given heads for the four classes, trained on frames of the 20 train films; settings are chosen on 8, and 12 are looked at last. Each step
leaves its result in WORK, and is not done again. Seed 0.
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
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from pycocotools.coco import COCO

import dynamicdet.video  # noqa: F401  (registers)
from dynamicdet.files import write_atomically
from dynamicdet.measuring.calibration import detection_arrays
from dynamicdet.measuring.flops import count_flops
from dynamicdet.models import fuse
from dynamicdet.routing.evaluation import Mixtures, evaluate, mixed_results
from dynamicdet.routing.record import Detections, RoutingRecord
from dynamicdet.routing.regions import grid_of
from dynamicdet.video.film_stakes import spans_of
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

STOCK = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'
CLASSES = ('airplane', 'bird', 'drone', 'helicopter')
#: Classes of COCO from which the classifier of each begins; neither drones nor helicopters are there.
#: Places in COCO's list of 80: airplane, bird, kite, airplane.
BEGIN = (4, 14, 33, 4)
#: Every so many frames of a train film are trained on, at one of these widths in turn.
TRAIN_STEP, TRAIN_SIZES = 21, (640, 320)
EPOCHS, BATCH, RATE = 4, 8, 1e-3
SEED = 0
#: Of val and test films every so many frames are looked at: 15 per second.
STEP = 2
#: So many of these are looked at, of each film the first.
MOST = dict(val=40, test=80)
#: Most GFLOPs of each budget, as a share of the plain detector's at full size.
BUDGETS = dict(high=0.35, middle=0.2, low=0.1)
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


def write_frames(data: Path, work: Path, split: str, step: int) -> Path:
    """Every ``step``-th frame of a split's films as JPEG, and CocoVID's JSON of them; its path."""
    path = work / f'{split}_{step}.json'
    if path.exists():
        return path
    videos, images, annotations = [], [], []
    for video_id, (name, film) in enumerate(films_of(data, split).items(), 1):
        videos.append(dict(id=video_id, name=name))
        folder = work / 'frames' / Path(name).stem
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(frames_of(data / 'drones' / name)):
            if number % step or number >= len(film['boxes']):
                continue
            file = folder / f'{number:04}.jpg'
            if not file.exists():
                cv2.imwrite(str(file), picture, [cv2.IMWRITE_JPEG_QUALITY, 97])
            height, width = picture.shape[:2]
            images.append(
                dict(
                    id=len(images) + 1,
                    file_name=str(file.relative_to(work / 'frames')),
                    height=height,
                    width=width,
                    video_id=video_id,
                    frame_id=number // step,
                )
            )
            for label, *box in film['boxes'][number]:
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=len(images),
                        category_id=label + 1,
                        bbox=box,
                        area=box[2] * box[3],
                        iscrowd=0,
                    )
                )
    categories = [dict(id=place + 1, name=name) for place, name in enumerate(CLASSES)]
    truth = dict(videos=videos, images=images, annotations=annotations, categories=categories)
    write_atomically(json.dumps(truth).encode(), path)
    return path


def train(args: argparse.Namespace) -> Path:
    """The plain detector with its heads trained anew, on maps of its neck that are computed once; the
    path of its weights. After a stop it goes on with the epoch after the last."""
    path, last = args.work / 'plain.pth', args.work / 'epoch.pth'
    if path.exists():
        return path
    truth = json.loads(write_frames(args.data, args.work, 'train', TRAIN_STEP).read_text())
    torch.manual_seed(SEED)
    model = build_plain()
    model.load_state_dict(first_weights(args.data), strict=False)
    maps = neck_maps(args, model, truth)
    model.bbox_head.train()
    optimizer = torch.optim.AdamW(model.bbox_head.parameters(), RATE, weight_decay=1e-4)
    count = len(truth['images'])
    updates = sum(
        -(-len(range(k, count, len(TRAIN_SIZES))) // BATCH) for k in range(len(TRAIN_SIZES))
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, EPOCHS * updates, pct_start=0.1
    )
    begin = 0
    if last.exists():
        state = torch.load(last, weights_only=True)
        begin = state['epoch']
        for part, name in (
            (model.bbox_head, 'head'),
            (optimizer, 'optimizer'),
            (scheduler, 'scheduler'),
        ):
            part.load_state_dict(state[name])
    for epoch in range(begin, EPOCHS):
        generator, sums = np.random.default_rng((SEED, epoch)), []
        order = generator.permutation(count)
        parts = [order[order % len(TRAIN_SIZES) == k] for k in range(len(TRAIN_SIZES))]
        batches = [part[at : at + BATCH] for part in parts for at in range(0, len(part), BATCH)]
        for place in generator.permutation(len(batches)):
            rows = batches[place]
            batch = [torch.stack(level).float() for level in zip(*(maps[row] for row in rows))]
            samples = [train_sample(truth, row) for row in rows]
            loss = sum(model.bbox_head.loss(batch, samples).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.bbox_head.parameters(), 35)
            optimizer.step()
            scheduler.step()
            sums.append(float(loss))
        print(f'epoch {epoch + 1}: loss {np.mean(sums):.2f}', flush=True)
        state = dict(
            epoch=epoch + 1,
            head=model.bbox_head.state_dict(),
            optimizer=optimizer.state_dict(),
            scheduler=scheduler.state_dict(),
        )
        write_atomically(lambda file: torch.save(state, file), last)
    meta = dict(dataset_meta=dict(classes=CLASSES))
    checkpoint = dict(state_dict=model.state_dict(), meta=meta)
    write_atomically(lambda file: torch.save(checkpoint, file), path)
    return path


def build_plain() -> torch.nn.Module:
    """YOLOX-nano of these classes, in eval mode."""
    cfg = get_config(STOCK)
    cfg.model.bbox_head.num_classes = len(CLASSES)
    return MODELS.build(cfg.model).eval()


@torch.no_grad()
def neck_maps(args: argparse.Namespace, model: torch.nn.Module, truth: dict) -> list[tuple]:
    """Of each train frame, at one of `TRAIN_SIZES`, the maps of the neck, float16; from their file
    where that is there."""
    path = args.work / f'maps_{TRAIN_STEP}.pt'
    if not path.exists():
        every = []
        for row, image in enumerate(truth['images']):
            picture = cv2.imread(str(args.work / 'frames' / image['file_name']))
            size = TRAIN_SIZES[row % len(TRAIN_SIZES)]
            data = model.data_preprocessor(deliver(picture, size, '', 0, 0), False)
            every.append(tuple(level[0].half() for level in model.extract_feat(data['inputs'])))
        write_atomically(lambda file: torch.save(every, file), path)
    return torch.load(path, weights_only=True)


def train_sample(truth: dict, row: int) -> DetDataSample:
    """What the heads are told of a train frame."""
    size = TRAIN_SIZES[row % len(TRAIN_SIZES)]
    image = truth['images'][row]
    boxes = [
        (one['category_id'] - 1, one['bbox'])
        for one in truth['annotations']
        if one['image_id'] == image['id']
    ]
    corners = torch.tensor([box for _, box in boxes]).reshape(-1, 4) * (size / image['width'])
    corners[:, 2:] += corners[:, :2]
    shape = round(image['height'] * size / image['width']), size
    sample = DetDataSample(metainfo=dict(img_shape=shape, batch_input_shape=shape))
    sample.gt_instances = InstanceData(
        bboxes=corners, labels=torch.tensor([label for label, _ in boxes]).long()
    )
    return sample


def first_weights(data: Path) -> dict[str, torch.Tensor]:
    """The published weights, with the classifiers of `BEGIN`."""
    file = torch.load(
        data / 'weights' / 'yolox_nano_mmdet.pth', map_location='cpu', weights_only=True
    )
    state = file.get('state_dict', file)
    return {
        key: value[list(BEGIN)] if '.multi_level_conv_cls.' in key else value
        for key, value in state.items()
    }


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

    found: Detections
    gflops: np.ndarray
    exits: np.ndarray


def build(args: argparse.Namespace, setting: Setting) -> torch.nn.Module:
    """The detector of a setting, fused, as tools run it."""
    cfg = get_config(STOCK)
    cfg.model.bbox_head.num_classes = len(CLASSES)
    detector = cfg.model
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
    state = torch.load(args.work / 'plain.pth', map_location='cpu', weights_only=True)['state_dict']
    model.load_state_dict(state, strict=False)
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
def run(args: argparse.Namespace, split: str, name: str, setting: Setting) -> Result:
    """A setting on a split, frame by frame; from its file where that is there."""
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
        lambda file: np.savez(file, gflops=gflops, exits=exits, **vars(result.found)), path
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
    found = result.found
    parts = [found.rows(row) for row in rows]
    columns = [(found.boxes[part], found.scores[part], found.categories[part]) for part in parts]
    return Result(Detections.join(columns), np.array(gflops), result.exits)


# Figures.


def judge(
    results: dict[str, Result], coco: COCO, names: list[str], resamples: int
) -> dict[str, dict]:
    """Of each result AP, AP50, mean GFLOPs, and how far AP is from the first result's, with a 95 %
    interval over films, drawn anew within their class."""
    count, every = len(names), [result.found for result in results.values()]
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
    for own in kinds.values():
        columns = [films.index(film) for film in own]
        draws[:, columns] = generator.multinomial(len(own), [1 / len(own)] * len(own), resamples)
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
    rows = {name: np.array(own)[frames:] for name, own in times.items()}
    return {
        name: dict(
            median=float(np.median(own[:, 0])),
            mean=float(own[:, 0].mean()),
            processor=float(own[:, 1].mean()),
        )
        for name, own in rows.items()
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
                rows.append((number, sample.get('gflops', np.nan), time.process_time() - start))
        every = np.array(rows)[STILL:]
        later = every[every[:, 0] > 0]
        figures[name] = dict(gflops=float(later[:, 1].mean()), processor=float(later[:, 2].mean()))
    return figures


# From films to figures.


def grid() -> dict[str, Setting]:
    """What is tried on the val films."""
    base = dict(every=10, change=6.0, appearing=0.5, halo=1)
    tried = [(base | dict(every=every), price) for every in (5, 10, 20) for price in (0.02, 0.1)]
    tried += [(base | change, 0.02) for change in (dict(halo=2), dict(appearing=0.0))]
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
        results[name] = run(args, 'val', name.replace(' ', '_'), setting)
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
        results[name] = run(args, 'test', name.replace(' ', '_'), setting)
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
            coco, [dict(one, image_id=row + 1) for row in rows for one in result.found[row]], ids
        )['ap']
        for name, result in results.items()
    }


def lines_of(figures: dict[str, dict]) -> list[str]:
    """A table."""
    lines = [
        '| | GFLOPs | AP | AP50 | above the first | exits -1, 0, 1 |',
        '|---|---|---|---|---|---|',
    ]
    for name, own in figures.items():
        above = '{:+.1f} ({:+.1f} to {:+.1f})'.format(*own['above'])
        exits = ' / '.join(f'{share:.0%}' for share in own['exits'].values())
        lines.append(
            f'| {name} | {own["gflops"]:.3f} | {own["ap"]:.1f} | {own["ap50"]:.1f} | {above} | {exits} |'
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('step', choices=('train', 'measure'))
    parser.add_argument('--data', type=Path, required=True, help='folder with drones/ and weights/')
    parser.add_argument(
        '--work', type=Path, required=True, help='folder for frames, weights and results'
    )
    parser.add_argument('--out', type=Path, default=Path('experiments/results/real_drones.json'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    args.work.mkdir(parents=True, exist_ok=True)
    dict(train=train, measure=measure)[args.step](args)


if __name__ == '__main__':
    main()

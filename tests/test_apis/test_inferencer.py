import functools
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from logging.handlers import BufferingHandler
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import FUNCTIONS, init_default_scope
from mmengine.runner import save_checkpoint
from mmengine.structures import InstanceData
from PIL import Image

from conftest import same_detections
from dynamicdet.apis import DynamicInferencer, DynamicVisualizer
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.routing.budget import Budget
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / 'configs/dy_faster_rcnn_digits.py')
CLASSES = tuple('0123456789')
#: Lowest of all thresholds and highest: every image is hard, is easy.
HARD, EASY = -1.0, 1.0


def save(path, model, cfg):
    """Write a checkpoint with what mmengine's Runner puts beside the weights."""
    meta = dict(dataset_meta=dict(classes=CLASSES), cfg=cfg.pretty_text, epoch=1, iter=10)
    save_checkpoint(dict(meta=meta, state_dict=model.state_dict()), str(path))
    return str(path)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Four pictures of several sizes, from flat to busy. Of one shape: a batch is padded to its
    largest, and the padding moves difficulties in the fifth digit."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for index, size in enumerate([(96, 128), (144, 192), (48, 64), (192, 256)]):
        noise = rng.normal(128, 1 + 30 * index, (*size, 3)).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f'{index}.png'), noise)
    return folder


@pytest.fixture(scope='module')
def paths(pictures):
    return [str(path) for path in sorted(pictures.iterdir())]


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory, paths):
    """Two checkpoints of one model: not calibrated, and calibrated on the pictures."""
    folder = tmp_path_factory.mktemp('checkpoints')
    cfg = Config.fromfile(CONFIG)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    # Random weights score all boxes alike; these lift a few above what is drawn.
    model.branches[0].roi_head.bbox_head.fc_cls.weight.data *= 20
    model.dataset_meta = dict(classes=CLASSES)
    found = dict(plain=save(folder / 'plain.pth', model, cfg))
    raw = init_detector(CONFIG, found['plain'], device='cpu')
    scores = sorted(inference_detector(raw, path).difficulty for path in paths)
    assert len(set(scores)) == 4
    model.difficulties, model.latencies = torch.tensor(scores), torch.tensor([0.01, 0.03])
    found['calibrated'] = save(folder / 'calibrated.pth', model, cfg)
    return found


@pytest.fixture(scope='module')
def detector(checkpoints):
    return DynamicInferencer(CONFIG, checkpoints['calibrated'], 'cpu', show_progress=False)


def exits(results):
    return [result['exit'] for result in results['predictions']]


# mmdet's own ways in.


@pytest.mark.parametrize('config', [CONFIG, None])
def test_mmdets_inferencer(config, checkpoints, paths, tmp_path):
    inferencer = DetInferencer(config, checkpoints['calibrated'], 'cpu', show_progress=False)
    results = inferencer(
        paths, batch_size=3, return_datasamples=True, return_vis=True, out_dir=str(tmp_path)
    )
    for path, sample, drawn in zip(paths, results['predictions'], results['visualization']):
        assert sample.img_path == path
        assert 0 <= sample.difficulty <= 1 and sample.exit == int(sample.difficulty > 0.5)
        assert black_corner(drawn)
    assert len(list((tmp_path / 'vis').iterdir())) == 4


def test_init_detector_takes_a_budget(checkpoints, paths):
    chosen = []
    for share in (0, 0.5, 1):
        model = init_detector(
            CONFIG,
            checkpoints['calibrated'],
            device='cpu',
            cfg_options={'model.budget': dict(hard_share=share)},
        )
        chosen.append(sum(sample.exit for sample in inference_detector(model, paths)))
    assert chosen == [0, 2, 4]
    assert tuple(model.dataset_meta['classes']) == CLASSES
    assert inference_detector(model, cv2.imread(paths[0])).exit == 1


def test_three_lines_in_another_process(checkpoints, paths, tmp_path):
    checkpoint = checkpoints['calibrated']
    code = (
        'from dynamicdet.apis import DynamicInferencer\n'
        f'detector = DynamicInferencer({CONFIG!r}, {checkpoint!r}, hard_share=1)\n'
        f'results = detector({paths[0]!r})\n'
        'print(results["predictions"][0]["exit"], end="")'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith('1')
    assert not list(tmp_path.iterdir())


# The dynamic one.


def test_results_and_files_carry_difficulty_and_exit(detector, checkpoints, paths, tmp_path):
    stock = DetInferencer(CONFIG, checkpoints['calibrated'], 'cpu', show_progress=False)
    results = detector(paths, no_save_pred=False, out_dir=str(tmp_path), batch_size=2)
    singly = detector(paths)['predictions']
    for path, result, single, theirs in zip(
        paths, results['predictions'], singly, stock(paths)['predictions']
    ):
        assert json.loads((tmp_path / 'preds' / f'{Path(path).stem}.json').read_text()) == result
        assert result['difficulty'] == pytest.approx(single['difficulty'], abs=1e-5)
        assert single.keys() - theirs.keys() == {'difficulty', 'exit'}
        assert {key: single[key] for key in theirs} == theirs
    assert sorted(path.name for path in (tmp_path / 'vis').iterdir()) == [
        f'{index}.png' for index in range(4)
    ]
    assert results['visualization'] == []  # a folder's pictures do not pile up in memory


def test_arrays(detector, paths, tmp_path):
    pictures = [cv2.imread(path) for path in paths[:2]]
    results = detector(pictures, no_save_pred=False, no_save_vis=True, out_dir=str(tmp_path))
    for index, result in enumerate(results['predictions']):
        assert json.loads((tmp_path / 'preds' / f'{index}.json').read_text()) == result


@pytest.mark.parametrize(
    'budget, hard',
    [
        (dict(threshold=HARD), 4),
        (dict(threshold=EASY), 0),
        (dict(hard_share=0.5), 2),
        (dict(hard_share=0.25), 1),
        (dict(target_latency=0.025), 3),
    ],
)
def test_budget_of_a_call(detector, paths, budget, hard):
    before = detector(paths)
    results = detector(paths, batch_size=4, **budget)
    assert sum(exits(results)) == hard
    scores = [result['difficulty'] for result in results['predictions']]
    assert exits(results) == [int(score in sorted(scores)[4 - hard :]) for score in scores]
    assert detector(paths) == before


def test_a_call_says_what_it_served_and_warns_where_chance_does_not_explain_it(detector, paths):
    detector(paths, batch_size=4, hard_share=0.5)
    assert detector.budget_report.counts == (2, 2) and detector.budget_report.budget == Budget(
        'hard_share', 0.5
    )
    # A calibration on images that were all easier.
    known, detector.model.difficulties = detector.model.difficulties, torch.linspace(0, 1e-4, 1000)
    try:
        with pytest.warns(
            UserWarning, match='100.0% of these 4 images are hard, and 10.0% were wanted'
        ):
            detector(paths, hard_share=0.1)
    finally:
        detector.model.difficulties = known
    assert detector.budget_report.doubts() and detector.budget_report.counts == (0, 4)


def test_latencies_of_another_machine_are_said_to_who_asks_for_time(checkpoints, paths, tmp_path):
    checkpoint = read_checkpoint(str(checkpoints['calibrated']))
    checkpoint['meta']['calibration'] = dict(device='another machine', threads=64, batch_size=8)
    torch.save(checkpoint, tmp_path / 'elsewhere.pth')
    other = DynamicInferencer(
        CONFIG, str(tmp_path / 'elsewhere.pth'), 'cpu', show_progress=False, hard_share=0.5
    )
    with pytest.warns(
        UserWarning, match='device another machine, threads 64, and here it is device'
    ):
        other(paths[0], target_latency=0.02)


def test_budget_of_the_constructor_is_restored(checkpoints, paths):
    detector = DynamicInferencer(
        CONFIG, checkpoints['calibrated'], 'cpu', hard_share=0.25, show_progress=False
    )
    assert sum(exits(detector(paths))) == 1
    assert sum(exits(detector(paths, threshold=HARD))) == 4
    with pytest.raises(UsageError, match="no picture at 'missing.png'"):
        detector('missing.png', threshold=HARD)
    with pytest.raises(UsageError):
        detector(paths, hard_share=2)
    assert sum(exits(detector(paths))) == 1
    assert detector.model.budget == Budget('hard_share', 0.25)


def test_waiting_budget_of_the_config_is_restored(checkpoints, paths):
    cfg = Config.fromfile(CONFIG)
    cfg.model.budget = dict(hard_share=0.5)
    detector = DynamicInferencer(cfg, checkpoints['plain'], 'cpu', show_progress=False)
    assert exits(detector(paths[0], threshold=HARD)) == [1]
    with pytest.raises(UsageError, match='calibrated'):
        detector(paths[0])


@pytest.mark.parametrize(
    'budget, said',
    [
        (dict(threshold=0.5, hard_share=0.5), 'exactly one'),
        (dict(throughput=30, target_latency=0.1), 'exactly one'),
        (dict(throughput=0), 'throughput .* above 0'),
        (dict(throughput=1000), 'lat1'),
        (dict(hard_share=1.5), r'\[0, 1\]'),
        (dict(threshold=float('nan')), r'\[-1, 1\]'),
        (dict(target_latency=0.001), 'lat1'),
    ],
)
def test_bad_budget(detector, checkpoints, paths, budget, said):
    with pytest.raises(UsageError, match=said):
        detector(paths[0], **budget)
    with pytest.raises(UsageError, match=said):
        DynamicInferencer(CONFIG, checkpoints['calibrated'], 'cpu', **budget)


def test_a_stream_gives_what_calls_give(checkpoints, paths):
    detector = DynamicInferencer(
        CONFIG, checkpoints['calibrated'], 'cpu', hard_share=0.5, show_progress=False
    )
    wanted = [detector(path)['predictions'][0] for path in paths] * 2
    found = list(
        detector.stream(iter([*paths, None, *map(cv2.imread, paths)]), batch_size=1, hard_batch=3)
    )
    assert len(found) == 8 and sum(result['exit'] for result in found) == 4
    for one, other in zip(found, wanted):
        assert one.keys() == other.keys() and one['exit'] == other['exit']
        assert same_detections(
            *(
                InstanceData(
                    **{key: torch.tensor(result[key]) for key in ('bboxes', 'scores', 'labels')}
                )
                for result in (one, other)
            )
        )


def test_a_stream_goes_on_behind_what_cannot_be_read(checkpoints, paths, tmp_path):
    detector = DynamicInferencer(
        CONFIG, checkpoints['calibrated'], 'cpu', hard_share=1, show_progress=False
    )
    (tmp_path / 'broken.jpg').write_bytes(Path(paths[0]).read_bytes()[:200])
    faulty = [str(tmp_path / 'broken.jpg'), str(tmp_path / 'none.jpg')]
    missed, mixed = [], [Path(paths[0]), faulty[0], None, paths[1], faulty[1], paths[2]]
    found = list(
        detector.stream(mixed, batch_size=2, on_unreadable=lambda path, reason: missed.append(path))
    )
    assert len(found) == 3 and missed == faulty
    kept = []
    with pytest.raises(UsageError, match='there is no picture at'):
        for result in detector.stream([*paths[:3], faulty[1], paths[3]], batch_size=2):
            kept.append(result)
    assert len(kept) == 3


def test_a_call_within_an_online_stream_has_its_own_speed(checkpoints, paths):
    detector = DynamicInferencer(
        CONFIG, checkpoints['plain'], 'cpu', hard_share=1, online=True, show_progress=False
    )
    stream = detector.stream(paths, batch_size=2)
    assert next(stream)['exit'] == 1
    seen = detector.controller.status()['images']
    assert exits(detector(paths[0], threshold=EASY)) == [0] and exits(
        detector(paths[0], threshold=-1)
    ) == [1]
    assert detector.controller.status()['images'] == seen
    assert [result['exit'] for result in stream] == [1] * 3


def test_an_online_budget(checkpoints, paths):
    """It needs no calibration, goes on from call to call and into streams, and lets a call have its
    own."""
    detector = DynamicInferencer(
        CONFIG, checkpoints['plain'], 'cpu', hard_share=1, online=True, show_progress=False
    )
    assert exits(detector(paths)) == [1] * 4
    assert [result['exit'] for result in detector.stream(paths, batch_size=2)] == [1] * 4
    assert exits(detector(paths, threshold=EASY)) == [0] * 4
    assert detector.controller.status()['images'] == 8 and detector.controller.mean == 1
    timed = DynamicInferencer(
        CONFIG,
        checkpoints['calibrated'],
        'cpu',
        target_latency=1e-6,
        online=True,
        show_progress=False,
    )
    # Below what is possible: not refused, since load may change; all are easy soon.
    assert timed.controller.share == 0 and exits(timed(paths)) == [0] * 4
    assert timed.controller.mean > 1e-4


@pytest.mark.parametrize('budget', [dict(), dict(threshold=0.5)])
def test_online_needs_something_to_hold(checkpoints, budget):
    with pytest.raises(UsageError, match='something to hold'):
        DynamicInferencer(CONFIG, checkpoints['plain'], 'cpu', online=True, **budget)


@pytest.mark.parametrize('budget', [dict(hard_share=0.5), dict(target_latency=0.02)])
def test_not_calibrated(checkpoints, budget):
    with pytest.raises(UsageError, match='calibrate.py'):
        DynamicInferencer(CONFIG, checkpoints['plain'], 'cpu', **budget)


def test_stock_model_is_refused():
    cfg = Config.fromfile(CONFIG)
    cfg.model = cfg.model.detector
    with pytest.raises(UsageError, match='FasterRCNN, is not dynamic'):
        DynamicInferencer(cfg, device='cpu')


def test_checkpoint_of_another_architecture_is_refused(checkpoints):
    cfg = Config.fromfile(CONFIG)
    cfg.model.detector.neck.out_channels = 24
    with pytest.raises(UsageError, match='does not fit'):
        DynamicInferencer(cfg, checkpoints['plain'], 'cpu')


def test_unreadable_pictures_are_left_out(detector, paths, tmp_path):
    text, cut = tmp_path / 'text.jpg', tmp_path / 'cut.png'
    text.write_text('no picture')
    cut.write_bytes(Path(paths[3]).read_bytes()[:-2000])
    mixed = [str(text), paths[0], str(cut), paths[1], str(tmp_path / 'gone.png')]
    faults = {}
    results = detector(mixed, on_unreadable=faults.__setitem__, return_datasamples=True)
    assert [sample.img_path for sample in results['predictions']] == paths[:2]
    assert list(faults) == [mixed[0], mixed[2], mixed[4]]
    assert 'no picture' in faults[mixed[0]] and 'truncated' in faults[mixed[2]]
    assert 'No such file' in faults[mixed[4]]


def test_each_picture_is_decoded_once(detector, paths, tmp_path, monkeypatch):
    """For the check, the detector and the drawing together; the same is found and drawn as by
    mmdet's way."""
    jpeg = str(tmp_path / 'a.jpg')
    cv2.imwrite(jpeg, cv2.imread(paths[3]))
    whole, faults = [], []
    for name, options in (
        ('once', dict(on_unreadable=lambda *fault: faults.append(fault))),
        ('plain', {}),
    ):
        counted = []
        decode, load = cv2.imdecode, Image.open
        with monkeypatch.context() as patch:
            patch.setattr(cv2, 'imdecode', lambda *args: counted.append('cv2') or decode(*args))
            patch.setattr(Image, 'open', lambda *args: counted.append('Pillow') or load(*args))
            whole.append(
                detector(
                    [*paths, jpeg],
                    out_dir=str(tmp_path / name),
                    return_vis=True,
                    batch_size=2,
                    **options,
                )
            )
        assert counted == ['cv2'] * 5 and not faults
        assert sorted(os.listdir(tmp_path / name / 'vis')) == [
            '0.png',
            '1.png',
            '2.png',
            '3.png',
            'a.jpg',
        ]
    assert whole[0]['predictions'] == whole[1]['predictions']
    assert all((one == two).all() for one, two in zip(*(one['visualization'] for one in whole)))


def test_pictures_of_other_kinds_are_detected_in_and_drawn(detector, paths, tmp_path):
    """As mmcv reads and cannot always write, such as small JPEG 2000."""
    mixed = []
    for ending in ('avif', 'gif', 'jp2'):
        mixed.append(str(tmp_path / f'{ending}.{ending}'))
        assert cv2.imwrite(mixed[-1], cv2.imread(paths[1]))
    cut = tmp_path / 'cut.avif'
    cut.write_bytes(Path(mixed[0]).read_bytes()[:-500])
    faults = {}
    results = detector(
        [*mixed, str(cut)], out_dir=str(tmp_path / 'out'), on_unreadable=faults.__setitem__
    )
    assert len(results['predictions']) == 3 and list(faults) == [str(cut)]
    assert sorted(os.listdir(tmp_path / 'out/vis')) == [
        'avif.avif.jpg',
        'gif.gif.jpg',
        'jp2.jp2.jpg',
    ]


# The corner.


def prediction(size, boxes, **facts):
    sample = DetDataSample(metainfo=facts)
    corners = torch.tensor([[0.4, 0.4, 0.9, 0.9]] * boxes).view(-1, 4)
    sample.pred_instances = InstanceData(
        bboxes=corners * torch.tensor([size[1], size[0]] * 2),
        scores=torch.full((boxes,), 0.9),
        labels=torch.zeros(boxes, dtype=torch.long),
    )
    return sample


def draw(size, boxes, gt=False, **facts):
    visualizer = DynamicVisualizer()
    visualizer.dataset_meta = dict(classes=CLASSES, palette=[(0, 255, 0)] * 10)
    sample = prediction(size, boxes, **facts)
    if gt:
        sample.gt_instances = InstanceData(
            bboxes=sample.pred_instances.bboxes, labels=sample.pred_instances.labels
        )
    visualizer.add_datasample('picture', np.full((*size, 3), 180, np.uint8), sample, draw_gt=gt)
    return visualizer.get_image()


def black_corner(drawn):
    """Whether the upper left has dark ground and light letters."""
    corner = drawn[1:10, 1:60]
    return (corner < 40).all(-1).mean() > 0.3 and (corner > 150).all(-1).any()


@pytest.mark.parametrize('boxes', [0, 2])
@pytest.mark.parametrize('size', [(64, 64), (96, 128), (480, 640), (120, 900), (500, 100)])
def test_corner_is_drawn_whole(size, boxes):
    plain, drawn = draw(size, boxes), draw(size, boxes, difficulty=0.4567, exit=1)
    rows, columns = np.nonzero((plain != drawn).any(-1))
    assert black_corner(drawn)
    # Not cut off; no more than it needs; nothing else differs.
    assert columns.max() < size[1] - 1 and rows.max() < 30
    assert columns.max() > 50 and rows.max() > 7
    assert len(rows) > 0.9 * (columns.max() - 1) * (rows.max() - 1)


def test_corner_tells_pictures_apart():
    size = (96, 128)
    drawn = [
        draw(size, 1, difficulty=difficulty, exit=exit)
        for difficulty, exit in ((0.12, 0), (0.12, 1), (0.98, 1))
    ]
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[1], drawn[2])


def test_corner_is_on_predictions_alone_and_once():
    size = (96, 128)
    plain, drawn = draw(size, 1, gt=True), draw(size, 1, gt=True, difficulty=0.5, exit=0)
    assert plain.shape == (96, 256, 3)
    assert np.array_equal(plain[:, :128], drawn[:, :128])
    assert np.array_equal(drawn[:, 128:], draw(size, 1, difficulty=0.5, exit=0))


def test_corner_is_not_left_over():
    visualizer = DynamicVisualizer()
    picture = np.full((96, 128, 3), 180, np.uint8)
    visualizer.add_datasample(
        'a', picture, prediction((96, 128), 0, difficulty=0.5, exit=0), draw_gt=False
    )
    visualizer.add_datasample('b', picture, prediction((96, 128), 0), draw_gt=False)
    assert np.array_equal(visualizer.get_image(), picture)


def test_inferencers_find_a_registry_of_functions_in_mmdets_scope():
    """Else mmengine warns for each inferencer that there is none."""
    logger, log = MMLogger.get_current_instance(), BufferingHandler(100)
    logger.addHandler(log)
    with FUNCTIONS.switch_scope_and_registry('mmdet') as registry:
        assert registry.scope == 'mmdet' and registry.get('pseudo_collate') is pseudo_collate
    logger.removeHandler(log)
    assert not [one.getMessage() for one in log.buffer if one.levelname == 'WARNING']


# The tool.


@pytest.fixture
def demo(monkeypatch, capfd, tmp_path):
    """Run tools/image_demo.py in a folder of its own; gives status, stdout, stderr."""
    spec = importlib.util.spec_from_file_location('image_demo', ROOT / 'tools/image_demo.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (tmp_path / 'run').mkdir()
    monkeypatch.chdir(tmp_path / 'run')

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['image_demo.py', *map(str, args)])
        with pytest.raises(SystemExit) as end:
            tool.cli.run(tool.main)
        captured = capfd.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


def written(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_demo_on_a_folder(demo, pictures, checkpoints):
    status, out, err = demo(
        pictures,
        CONFIG,
        checkpoints['calibrated'],
        '--batch-size',
        3,
        '--hard-share',
        0.5,
        '--device',
        'cpu',
    )
    assert status == 0, err
    hard, cost, last = out.splitlines()[-3:]
    assert (hard, last) == (
        'hard: 50.0% wanted, 50.0% served (2 of 4 images)',
        '4 images; results in outputs',
    )
    # The first batch of 3 is no measure.
    assert cost.startswith("per image: 20.0 ms by the exits' own latencies, ") and cost.endswith(
        ' ms by the clock'
    )
    assert written('outputs/vis') == [f'{index}.png' for index in range(4)]
    results = [json.loads(path.read_text()) for path in Path('outputs/preds').iterdir()]
    assert sum(result['exit'] for result in results) == 2


def test_demo_goes_on_after_a_broken_picture(demo, pictures, checkpoints, paths, tmp_path):
    folder = tmp_path / 'mixed'
    folder.mkdir()
    for name in ('b.PNG', 'c.png'):
        (folder / name).write_bytes(Path(paths[0]).read_bytes())
    (folder / 'a.png').write_text('no picture')
    (folder / 'notes.txt').write_text('left alone')
    status, out, err = demo(
        folder,
        CONFIG,
        checkpoints['plain'],
        '--out-dir',
        'there',
        '--threshold',
        1,
        '--no-save-vis',
    )
    assert status == 1
    assert err.splitlines() == [f"error: '{folder / 'a.png'}' is no picture, or damaged"]
    assert (
        'hard: 0.0% served (0 of 2 images)' in out
        and out.splitlines()[-1] == '2 images; results in there'
    )
    assert written('there') == ['preds'] and written('there/preds') == ['b.json', 'c.json']


@pytest.fixture
def server(pictures, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(pictures))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_demo_on_urls_and_files(demo, server, checkpoints, paths):
    status, out, err = demo(
        f'{server}/0.png?size=full',
        f'{server}/1.png',
        paths[2],
        CONFIG,
        checkpoints['plain'],
        '--no-save-pred',
    )
    assert status == 0, err
    assert out.splitlines()[-1].startswith('3 images; ')
    assert written('outputs/vis') == ['0.png', '1.png', '2.png']
    assert written('outputs') == ['vis']
    status, _, err = demo(f'{server}/gone.png', CONFIG, checkpoints['plain'])
    assert status == 2
    assert 'gone.png' in err.splitlines()[-1] and '404' in err.splitlines()[-1]


def test_demo_writes_nothing_where_told(demo, checkpoints, paths):
    status, out, _ = demo(
        paths[0], CONFIG, checkpoints['plain'], '--no-save-vis', '--no-save-pred', '--print-result'
    )
    assert status == 0
    assert "'difficulty'" in out and out.endswith('nothing written\n')
    assert not os.listdir()


@pytest.mark.parametrize(
    'args, said',
    [
        (['gone.png', CONFIG, 'CKPT'], "no picture or folder at 'gone.png'"),
        (['gone/', CONFIG, 'CKPT'], "no picture or folder at 'gone/'"),
        (['EMPTY', CONFIG, 'CKPT'], 'there is no picture in'),
        (['TEXT', CONFIG, 'CKPT'], 'is no picture, or damaged'),
        (['CKPT', CONFIG, 'CKPT'], 'must end in one of'),
        (['PICTURE', 'PICTURES', CONFIG, 'CKPT', '--out-dir', 'x'], 'would write the same'),
        (['PICTURE', 'gone.py', 'CKPT'], "no config at 'gone.py'"),
        (['PICTURE', CONFIG, 'gone.pth'], "no checkpoint at 'gone.pth'"),
        (['PICTURE', CONFIG, 'TEXT'], 'is no checkpoint'),
        (['PICTURE', CONFIG, 'CKPT', '--hard-share', '0.5'], 'calibrate.py'),
        (['PICTURE', CONFIG, 'CKPT', '--hard-share', '5'], 'hard_share must be'),
        (['PICTURE', CONFIG, 'CKPT', '--device', 'abacus'], 'abacus'),
    ],
)
def test_demo_says_what_is_wrong(demo, checkpoints, paths, tmp_path, args, said):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.png').write_text('no picture')
    (tmp_path / 'copy').mkdir()
    (tmp_path / 'copy' / '0.jpg').write_bytes(Path(paths[0]).read_bytes())
    names = dict(
        CKPT=checkpoints['plain'],
        PICTURE=paths[0],
        PICTURES=tmp_path / 'copy',
        EMPTY=tmp_path / 'empty',
        TEXT=tmp_path / 'text.png',
    )
    status, _, err = demo(*(names.get(arg, arg) for arg in args))
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith('error: ') and said in line
    assert not os.listdir()


def test_demo_keeps_the_trace_of_a_bug(demo, checkpoints, paths, monkeypatch):
    monkeypatch.setattr(DynamicInferencer, 'forward', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo(paths[0], CONFIG, checkpoints['plain'])

"""Detectors that run without this project: the folder's own file and graphs against torch."""

import ast
import copy
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from PIL import Image
from standalone_cases import (
    DYNAMIC,
    IN_DYNAMIC,
    PIPELINE,
    PLAIN,
    SIZES,
    build,
    by_torch,
    delivered,
    require_same,
    settings,
    write,
    written,
)

from conftest import ROOT, call_tool, recordable_options
from dynamicdet.building import build_loader, load_detector
from dynamicdet.deploy import standalone_runtime
from dynamicdet.deploy.standalone import export_standalone, read_delivery
from dynamicdet.deploy.tensorrt import refused_by_tensorrt
from dynamicdet.errors import UsageError
from dynamicdet.measuring.latencies import force_dynamic_exit
from dynamicdet.routing.thresholds import threshold_for_share


def require_built_by_tensorrt(folder):
    """But for YOLOv5's and YOLOv7's 30000 candidates, which a config may change."""
    for path in folder.glob('*.onnx'):
        said = refused_by_tensorrt(path.read_bytes())
        assert [line for line in said if 'takes 30000' not in line] == []


@pytest.mark.parametrize('name', [name for name in PLAIN if name not in IN_DYNAMIC])
def test_plain_detectors_are_torchs(name):
    model, detector, folder = written(name)
    assert {path.name for path in folder.iterdir()} == {
        'detector.onnx',
        'detector.json',
        'runtime.py',
    }
    kinds = {node.op_type for node in onnx.load(folder / 'detector.onnx').graph.node}
    assert 'NonMaxSuppression' in kinds
    require_built_by_tensorrt(folder)
    counts = []
    for size in SIZES:
        batch, given = delivered(model, size)
        found = detector.run(*given, None)
        require_same(found, by_torch(model, batch), given[1])
        assert (found.difficulty, found.exit) == (None, 0)
        counts.append(len(found.scores))
    assert min(counts) > 5


@pytest.mark.parametrize('name', DYNAMIC)
def test_dynamic_detectors_are_torchs_at_every_threshold(name):
    model, detector, folder = written(name)
    require_built_by_tensorrt(folder)
    batches = [delivered(model, size, seed) for seed, size in enumerate((*SIZES, SIZES[0]))]
    difficulties = [by_torch(model, batch).difficulty for batch, _ in batches]
    between = float(np.mean(sorted(difficulties)[1:3]))
    seen = []
    for threshold in (-1.0, between, 1.0):
        model.set_budget(threshold=threshold)
        exits = []
        for batch, given in batches:
            found, sample = detector.run(*given, threshold), by_torch(model, batch)
            assert found.exit == sample.exit
            assert found.difficulty == pytest.approx(sample.difficulty, abs=1e-5)
            assert len(found.scores)
            require_same(found, sample, given[1])
            exits.append(found.exit)
        seen.append(sum(exits))
    assert seen[0] == len(batches) and seen[2] == 0 and 0 < seen[1] < len(batches)


def test_no_more_is_found_than_may_be(tmp_path):
    model = settings('retinanet')
    model.test_cfg.max_per_img = 7
    built, detector = write(model, tmp_path / 'few')
    batch, given = delivered(built, SIZES[2])
    found = detector.run(*given, None)
    require_same(found, by_torch(built, batch), given[1])
    assert len(found.scores) == 7


def test_nothing_is_found_where_no_score_is_high_enough(tmp_path):
    model = settings('retinanet')
    model.test_cfg.score_thr = 1.0
    built, detector = write(model, tmp_path / 'none')
    batch, given = delivered(built, SIZES[2])
    found = detector.run(*given, None)
    assert not len(by_torch(built, batch).pred_instances)
    assert found.boxes.shape == (0, 4) and found.scores.shape == found.labels.shape == (0,)


def test_the_easy_path_never_runs_the_second_graph():
    model, detector, _ = written('dynamic yolox')
    first, second = detector.sessions
    _, given = delivered(model, SIZES[0])

    class Forbidden:
        def get_inputs(self):
            raise AssertionError('the second graph was asked')

    try:
        detector.sessions = [first, Forbidden()]
        assert detector.run(*given, 1.0).exit == 0
        with pytest.raises(AssertionError, match='second graph'):
            detector.run(*given, -1.0)
    finally:
        detector.sessions = [first, second]


def test_the_second_graph_takes_what_it_looks_at():
    """Of a cascade with a common stem maps; of others the image."""
    for name, maps in (('dynamic fcos sees both', 4), ('dy_yolox_nano_yolov5_n', 0)):
        first, second = written(name)[1].sessions
        names = [entry.name for entry in second.get_inputs()]
        assert sum(one.startswith('map') for one in names) == maps
        assert [one.name for one in first.get_outputs()][4:] == [
            one for one in names if one.startswith('map')
        ]


def test_scaled_scores_are_torchs(tmp_path):
    model = settings('dynamic yolox')
    cfg = Config(dict(model=model, test_dataloader=dict(dataset=dict(type='x', pipeline=PIPELINE))))
    built = build(model)
    built.set_platt_scaling([(1.5, 0.5), (0.5, -0.5)])
    torch.save(dict(state_dict=built.state_dict(), meta={}), tmp_path / 'scaled.pth')
    export_standalone(cfg, str(tmp_path / 'scaled.pth'), str(tmp_path / 'out'))
    detector = standalone_runtime.Detector(tmp_path / 'out', threads=1)
    batch, given = delivered(built, SIZES[0])
    for exit, threshold in enumerate((1.0, -1.0)):
        force_dynamic_exit(built, exit)
        require_same(detector.run(*given, threshold), by_torch(built, batch), given[1])


#: Runs a file as a program where packages of this project's cannot be imported.
ALONE = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'mmdet', 'mmengine', 'mmcv', 'dynamicdet', 'cv2'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_the_folder_stands_alone(tmp_path):
    _, detector, folder = written('dynamic yolox')
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    for share, exit in (('0', 0), ('1', 1)):
        done = subprocess.run(
            [
                *(sys.executable, '-I', '-c', ALONE, str(folder / 'runtime.py')),
                *(str(tmp_path / 'image.png'), '--hard-share', share, '--min-score', '0'),
            ],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        head, *rows = done.stdout.splitlines()
        found = detector(np.ascontiguousarray(pixels[..., ::-1]), hard_share=float(share))
        assert found.exit == exit and len(found.scores)
        assert head == (
            f'exit {exit}, difficulty {found.difficulty:.3f}, {len(found.scores)} objects'
        )
        assert rows == [
            ' '.join([str(label), f'{score:.3f}', *(f'{side:.1f}' for side in box)])
            for box, score, label in zip(found.boxes, found.scores, found.labels)
        ]


def test_runtime_is_short_and_imports_nothing_else():
    path = ROOT / 'projects/dynamicdet/deploy/standalone_runtime.py'
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    imported = {
        name.split('.')[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {'numpy', 'onnxruntime', 'PIL'}


def run_main(folder, monkeypatch, capsys, *arguments):
    """The command line of a folder's own file, in this process: its status, and what it says."""
    spec = importlib.util.spec_from_file_location('runtime_of_folder', folder / 'runtime.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, 'argv', ['runtime.py', *map(str, arguments)])
    status = 0
    try:
        module.main()
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    folder = written('dynamic yolox')[2]
    Image.fromarray(np.full((80, 90, 3), 99, np.uint8)).save(tmp_path / 'good.jpg')
    (tmp_path / 'text.jpg').write_text('no picture')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'good.jpg').read_bytes()[:-100])
    good = tmp_path / 'good.jpg'
    for arguments, said in (
        ([tmp_path / 'text.jpg'], 'cannot read .*text.jpg'),
        ([tmp_path / 'cut.jpg'], 'cut.jpg.*truncated'),
        ([tmp_path / 'gone.jpg'], 'gone.jpg'),
        ([good, '--threshold', 2], r'threshold must be in \[-1, 1\], got 2'),
        ([good, '--threshold', 'nan'], r'threshold must be in \[-1, 1\], got nan'),
        ([good, '--hard-share', -0.5], r'hard share is in \[0, 1\].*got -0.5'),
        ([good, '--hard-share', 0.5, '--threshold', 0.5], 'not both'),
        ([good, '--folder', tmp_path], 'no detector'),
    ):
        status, text = run_main(folder, monkeypatch, capsys, *arguments)
        assert status == 2 and text.count('\n') == 1, text
        assert re.search(f'^error: .*{said}', text), text
    assert run_main(folder, monkeypatch, capsys, good)[0] == 0


def test_folders_of_another_version_or_changed_are_refused(tmp_path, monkeypatch, capsys):
    folder = written('yolox')[2]
    good = tmp_path / 'good.png'
    Image.fromarray(np.full((80, 90, 3), 99, np.uint8)).save(good)
    for name, change, said in (
        ('detector.json', lambda data: data.replace(b'"version": 1', b'"version": 7'), 'version 7'),
        ('detector.json', lambda data: data[: len(data) // 2], 'no detector'),
        ('detector.onnx', lambda data: data[:-1], 'missing or was changed'),
    ):
        other = tmp_path / 'other'
        other.mkdir(exist_ok=True)
        for path in folder.iterdir():
            data = path.read_bytes()
            (other / path.name).write_bytes(change(data) if path.name == name else data)
        status, text = run_main(folder, monkeypatch, capsys, good, '--folder', other)
        assert status == 2 and text.count('\n') == 1 and said in text
    status, text = run_main(folder, monkeypatch, capsys, good, '--threshold', 0.5)
    assert status == 2 and 'not dynamic' in text
    detector = written('yolox')[1]
    for image in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match='array of uint8'):
            detector(image)


def test_hard_shares_become_the_projects_thresholds():
    detector = copy.copy(written('dynamic yolox')[1])
    rng = np.random.default_rng(0)
    for difficulties in (rng.random(101), rng.integers(0, 5, 50) / 5, np.full(9, 0.5)):
        detector.about = dict(detector.about, difficulties=difficulties.tolist())
        for share in (0, 0.01, 0.3, 0.5, 0.77, 1):
            wanted = threshold_for_share(difficulties, share)
            assert detector.threshold_for(hard_share=share) == wanted


PIPELINES = (
    [dict(type='Resize', scale=(150, 100), keep_ratio=True)],
    [dict(type='Resize', scale=(150, 100), keep_ratio=False)],
    [
        dict(type='Resize', scale=(96, 96), keep_ratio=True),
        dict(type='Pad', size=(96, 96), pad_val=dict(img=(114, 113, 112))),
    ],
    [
        dict(type='Resize', scale=(160, 160), keep_ratio=True),
        dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
    ],
    [dict(type='Pad', size_divisor=32)],
    [],
)


@pytest.mark.parametrize('steps', PIPELINES, ids=str)
def test_images_are_delivered_as_the_test_pipeline_does(steps):
    detector = copy.copy(written('yolox')[1])
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps))))
    detector.about = dict(detector.about, **read_delivery(cfg))
    for shape in ((61, 83), (200, 90), (100, 150), (33, 47)):
        image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
        result = dict(img=image, img_shape=shape, ori_shape=shape)
        wanted = Compose(copy.deepcopy(steps))(result)
        got, scale = detector.deliver(image)
        assert scale == pytest.approx(wanted.get('scale_factor', (1, 1)))
        assert got.shape == wanted['img'].shape and got.dtype == np.uint8
        # OpenCV resizes with fractions of 11 bits.
        assert np.abs(got.astype(int) - wanted['img']).max() <= 1


def changed(name, **changes):
    model = settings(name)
    model.merge_from_dict(changes) if hasattr(model, 'merge_from_dict') else model.update(changes)
    return model


REFUSED = (
    (lambda: changed('dynamic yolox', merge='nms'), 'merged exits'),
    (lambda: changed('dynamic yolox', backbones=3), '3 exits'),
    (
        lambda: changed('retinanet', test_cfg=dict(nms=dict(type='soft_nms', iou_threshold=0.5))),
        'as NMS of RetinaHead',
    ),
)


@pytest.mark.parametrize('model, said', REFUSED, ids=[said for _, said in REFUSED])
def test_what_is_not_supported_is_refused_in_one_line(model, said, tmp_path):
    with pytest.raises(UsageError, match=said) as error:
        write(model(), tmp_path / 'out')
    assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'step, said',
    (
        (dict(type='RandomFlip', prob=0.5), 'step RandomFlip'),
        (dict(type='Resize', scale=(9, 9), interpolation='nearest'), "interpolation='nearest'"),
        (dict(type='Resize', scale_factor=2.0), 'scale_factor=2.0'),
        (dict(type='LoadImageFromFile', to_float32=True), 'to_float32=True'),
    ),
)
def test_pipelines_that_runtime_does_not_know_are_refused(step, said):
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[step]))))
    with pytest.raises(UsageError, match=said):
        read_delivery(cfg)


def test_the_tool_writes_a_folder_that_says_what_exits_cost(digits, tmp_path, capsys):
    name = 'dy_yolox_nano_digits'
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.merge_from_dict(recordable_options(name, digits))
    path = str(tmp_path / 'random.pth')
    built = build(cfg.model)
    for name, weight in built.named_parameters():
        if name.endswith('weight') and 'multi_level_conv' in name:
            # Behind both whole backbones they would still make boxes of 1e22 pixels.
            weight.data *= 0.01
    built.difficulties, built.threshold[...] = torch.tensor([0.2, 0.3, 0.4]), 0.25
    torch.save(dict(state_dict=built.state_dict(), meta={}), path)
    cfg.dump(tmp_path / 'config.py')
    out = tmp_path / 'out'
    arguments = ('export.py', tmp_path / 'config.py', path, '--standalone', '--out')
    for options, said in (
        (['--compress'], 'leave out --compress'),
        (['--int8', '--float16'], 'not both'),
    ):
        assert call_tool(*arguments, out, *options) == 2
        assert said in capsys.readouterr().err
    assert call_tool(*arguments, out, '--dry-run') == 0
    assert 'first.onnx, second.onnx' in capsys.readouterr().out and not out.exists()
    assert call_tool(*arguments, out) == 0
    assert 'exit 1' in capsys.readouterr().out
    about = json.loads((out / 'detector.json').read_text())
    assert about['gflops'][1] > about['gflops'][0] > 0
    assert about['seconds'][1] > about['seconds'][0] > 0
    assert about['classes'] == list(cfg.metainfo.classes)
    # What the pipeline makes of a file, by either.
    model, _ = load_detector(cfg, path)
    loader = dict(cfg.val_dataloader, num_workers=0, persistent_workers=False)
    item = build_loader(loader).dataset[0]
    detector = standalone_runtime.Detector(out, threads=1)
    image = standalone_runtime.read_image(item['data_samples'].img_path)
    got, _ = detector.deliver(image)
    assert np.abs(got.transpose(2, 0, 1).astype(int) - item['inputs'].numpy()).max() <= 1
    # In digits' plain background many scores are equal but for rounding.
    noise = torch.randint(0, 256, item['inputs'].shape, dtype=torch.uint8)
    for exit, threshold in enumerate((1.0, -1.0)):
        force_dynamic_exit(model, exit)
        sample = by_torch(model, dict(inputs=[noise], data_samples=[item['data_samples']]))
        given = noise.numpy(), sample.scale_factor, sample.ori_shape
        require_same(detector.run(*given, threshold), sample, sample.scale_factor)
    assert call_tool(*arguments, out) == 2
    assert 'is there already' in capsys.readouterr().err
    eight = tmp_path / 'eight'
    options = ('--int8', '--one-file', '--calibrate-images', 2, '--reduce-range', 'yes')
    assert call_tool(*arguments, eight, *options) == 0
    said = capsys.readouterr().out
    assert 'branch0: noise' in said and 'weights have 7 bits' in said
    about = json.loads((eight / 'detector.json').read_text())
    assert about['precision'] == 'int8' and list(about['graphs']) == ['detector.onnx']
    assert about['quantization']['calibration'] == dict(images=2, ranges='mse')
    assert about['gflops'][1] > about['gflops'][0] > 0
    # Moved by what 8 bits change, but in their order, and with the threshold.
    moved = np.array(about['difficulties'])
    assert len(moved) == 3 and (np.diff(moved) > 0).all() and moved[0] != np.float32(0.2)
    assert moved[0] < about['threshold'] < moved[1]
    smaller = standalone_runtime.Detector(eight, threads=1)
    assert [smaller(image, hard_share=share).exit for share in (0, 1)] == [0, 1]

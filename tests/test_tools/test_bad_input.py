"""What a user gets wrong is one line that says what to do, and exit status 2."""

import contextlib
import io
import json
import pickle
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from conftest import ROOT, run_tool, shrink_options
from dynamicdet.datasets import annotation_repair
from dynamicdet.datasets.digits import SIZES
from dynamicdet.deploy.runtimes import RUNTIMES
from dynamicdet.interop import SOURCES
from dynamicdet.measuring.benchmark import BATCH_SIZE, DTYPES, FORMATS
from dynamicdet.measuring.model_zoo import SHARES
from dynamicdet.measuring.recording import VIEWS
from dynamicdet.routing import OBJECTIVES
from dynamicdet.video.digits_video import SIZES as VIDEO_SIZES
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

STEP_1 = ROOT / 'configs/dy_faster_rcnn_digits.py'
STEP_2 = ROOT / 'configs/dy_faster_rcnn_digits_router.py'


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Work dirs go below the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='module')
def checkpoints(digits, tmp_path_factory):
    """Name -> path of checkpoints of random weights, and of files that are none."""
    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('checkpoints')
    cfg = Config.fromfile(STEP_2)
    cfg.merge_from_dict(shrink_options(digits))
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.branches[0].roi_head.bbox_head.fc_cls.weight.data *= 20
    torch.save(dict(state_dict=model.state_dict()), folder / 'cascade.pth')
    model.delta.fill_(0.1)
    torch.save(dict(state_dict=model.state_dict()), folder / 'router.pth')
    model.difficulties, model.latencies = torch.linspace(0.4, 0.6, 6), torch.tensor([0.01, 0.03])
    torch.save(dict(state_dict=model.state_dict()), folder / 'calibrated.pth')
    cfg.merge_from_dict(
        {'model.backbone.base_channels': 4, 'model.detector.neck.in_channels': [4, 8, 16, 32]}
    )
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), folder / 'other.pth')
    (folder / 'text.pth').write_text('these are no weights')
    (folder / 'list.pth').write_bytes(pickle.dumps(['no', 'weights']))
    whole = (folder / 'router.pth').read_bytes()
    (folder / 'truncated.pth').write_bytes(whole[: len(whole) // 2])
    (folder / 'empty.pth').touch()
    return {file.stem: file for file in folder.iterdir()}


@pytest.fixture
def tool(digits, monkeypatch):
    """``tool(name, *arguments, root=digits, **options)`` runs a tool in this process."""

    def run(name, *arguments, root=digits, **options):
        settings = {
            **shrink_options(root),
            'train_cfg.max_epochs': 1,
            'train_cfg.val_interval': 9,
            **options,
        }
        pairs = [f'{key}={value}' for key, value in settings.items()]
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments), '--cfg-options', *pairs])
        with contextlib.redirect_stderr(io.StringIO()) as said:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / 'tools' / f'{name}.py'), run_name='__main__')
        return ended.value.code or 0, said.getvalue()

    return run


def error_of(result):
    """The one line of a refusal."""
    status, said = result
    assert status == 2, said
    lines = said.strip().splitlines()
    assert lines[-1].startswith('error: ') and len(lines[-1]) > 20
    assert said.count('error: ') == 1 and 'Traceback' not in said
    return lines[-1]


def warnings_of(result):
    """The lines about the data of a run that went well."""
    status, said = result
    assert status == 0, said
    return [line for line in said.splitlines() if line.startswith('data: ')]


# Before anything is imported.

TOOLS = sorted((ROOT / 'tools').glob('*.py'))

#: Runs a tool without its work: prints its status, and whether it has imported what takes seconds.
_LIGHT = """
import runpy, sys
for tool in sys.argv[2:]:
    sys.argv = [tool, *sys.argv[1:2]]
    try:
        runpy.run_path(tool, run_name='__main__')
    except SystemExit as ended:
        heavy = {'torch', 'mmengine', 'mmdet', 'numpy', 'dynamicdet'} & sys.modules.keys()
        print('status', tool, ended.code, *heavy)
"""


@pytest.mark.parametrize('option, status', [('--help', 0), ('--no-such-option', 2)])
def test_help_and_wrong_options_wait_for_no_import(option, status):
    done = subprocess.run(
        [sys.executable, '-c', _LIGHT, option, *map(str, TOOLS)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    said = [line.split(' ', 1)[1] for line in done.stdout.splitlines() if line[:7] == 'status ']
    assert said == [f'{tool} {status}' for tool in TOOLS] and len(said) > 20


@pytest.mark.parametrize(
    'name, choices',
    [
        ('convert_checkpoint', SOURCES),
        ('fit_router', [name for name in OBJECTIVES if name != 'cost_weight']),
        ('record', [*VIEWS, 'none']),
        ('report', [*VIEWS, 'none']),
        ('benchmark', DTYPES),
        ('benchmark', FORMATS),
        ('test_deployed', RUNTIMES),
    ],
)
def test_options_offer_what_the_library_has(name, choices):
    """Tools write it down again, since they import the library later."""
    done = run_tool(f'{name}.py', '--help')
    assert f'{{{",".join(choices)}}}' in ''.join(done.stdout.split())


@pytest.mark.parametrize(
    'name, said',
    [
        ('benchmark', f'all batches of {BATCH_SIZE}: '),
        ('get_flops', f'0 to 1: {" ".join(map(str, SHARES))}'),
        *(('make_digits', f'{key} images (default: {size})') for key, size in SIZES.items()),
        *(
            ('make_digits_video', f'{key} videos (default: {size})')
            for key, size in VIDEO_SIZES.items()
        ),
    ],
)
def test_options_have_the_librarys_defaults(name, said):
    assert said in ' '.join(run_tool(f'{name}.py', '--help').stdout.split())


# Configs.


@pytest.mark.parametrize(
    'arguments',
    [('train',), ('test', 'x.pth'), ('calibrate', 'x.pth')],
    ids=lambda arguments: arguments[0],
)
def test_a_missing_config(tool, arguments):
    name, *rest = arguments
    assert "no config at 'nowhere.py'" in error_of(tool(name, 'nowhere.py', *rest))


@pytest.mark.parametrize(
    'text, said',
    [
        ('model = dict(', ''),
        ("_base_ = 'missing.py'", 'missing.py'),
        ("_base_ = 'mmdet::no/such.py'", ''),
        ("custom_imports = dict(imports=['no_such_package'])", 'no_such_package'),
        ('a = 1 / 0', 'division by zero'),
        ('a = b', "'b' is not defined"),
        ('x = 1', 'model'),
        ("model = dict(type='NoSuchDetector')", 'NoSuchDetector'),
    ],
)
def test_a_bad_config(tool, tmp_path, checkpoints, text, said):
    (tmp_path / 'bad.py').write_text(text)
    for name, *rest in (
        ['train'],
        ['test', checkpoints['router']],
        ['calibrate', checkpoints['router']],
    ):
        line = error_of(tool(name, 'bad.py', *rest))
        assert 'bad.py' in line and said in line


def test_a_config_that_is_a_folder_or_no_python(tool, tmp_path, checkpoints):
    (tmp_path / 'notes.txt').write_text('hello')
    for path in (tmp_path, tmp_path / 'notes.txt', checkpoints['router']):
        assert str(path) in error_of(tool('train', path))


# Checkpoints.

NONE = ('missing', 'text', 'list', 'truncated', 'empty')


@pytest.mark.parametrize('kind', NONE)
def test_no_checkpoint(tool, checkpoints, tmp_path, kind):
    path = checkpoints.get(kind, tmp_path / 'missing.pth')
    for name in ('test', 'calibrate'):
        assert str(path) in error_of(tool(name, STEP_2, path))
    for config in (STEP_1, STEP_2):
        assert str(path) in error_of(tool('train', config, load_from=path))
    assert str(path) in error_of(tool('train', STEP_1, '--resume', path))


def test_missing_weights_to_start_from(tool, tmp_path):
    line = error_of(tool('train', STEP_1, load_from=tmp_path / 'missing.pth'))
    assert 'make it first' in line
    assert '--cfg-options load_from=...' in line


def test_another_architecture(tool, checkpoints):
    for line in (
        error_of(tool('test', STEP_2, checkpoints['other'])),
        error_of(tool('calibrate', STEP_2, checkpoints['other'])),
        error_of(tool('train', STEP_2, load_from=checkpoints['other'])),
    ):
        assert 'does not fit this config' in line
        assert 'of another shape (such as backbone.first' in line


def test_step_2_without_step_1(tool):
    line = error_of(tool('train', STEP_2))
    assert 'run step 1 first' in line and 'work_dirs/dy_faster_rcnn_digits' in line
    assert 'load_from=' in line


def test_step_2_opens_no_weights_that_it_does_not_use(tool, tmp_path):
    (tmp_path / 'published.py').write_text(f"_base_ = '{STEP_2}'\nload_from = 'gone.pth'")
    (tmp_path / 'step2.py').write_text("_base_ = './published.py'")
    assert 'run step 1 first' in error_of(tool('train', tmp_path / 'step2.py'))
    assert "'gone.pth'" in error_of(tool('train', tmp_path / 'published.py'))


def test_an_annotation_file_is_read_once(tool, checkpoints, tmp_path, monkeypatch):
    """Of COCO one is half a gigabyte."""
    read, reader = [], annotation_repair.read_annotations
    monkeypatch.setattr(
        annotation_repair, 'read_annotations', lambda *args: read.append(args[0]) or reader(*args)
    )
    for name, out in (('calibrate', 'x.pth'), ('record', 'x.npz')):
        read.clear()
        status, said = tool(name, STEP_2, checkpoints['router'], '--out', tmp_path / out)
        assert status == 0 and len(read) == 1, said


def test_calibrating_step_1(tool, checkpoints):
    before = checkpoints['cascade'].read_bytes()
    line = error_of(tool('calibrate', STEP_2, checkpoints['cascade']))
    assert 'train the router (step 2)' in line
    assert checkpoints['cascade'].read_bytes() == before


# Budgets.


@pytest.mark.parametrize(
    'arguments, said',
    [
        (('--hard-share', '1.5'), 'in [0, 1]'),
        (('--hard-share', 'nan'), 'in [0, 1]'),
        (('--hard-share=-0.1',), 'in [0, 1]'),
        (('--threshold', '3'), 'in [-1, 1]'),
        (('--threshold', 'nan'), 'in [-1, 1]'),
        (('--target-latency', '0.005'), '0.01'),
        (('--target-latency', 'nan'), 'nan'),
    ],
)
def test_budgets_out_of_range(tool, checkpoints, arguments, said):
    assert said in error_of(tool('test', STEP_2, checkpoints['calibrated'], *arguments))


def test_a_latency_out_of_reach_names_both(tool, checkpoints):
    line = error_of(tool('test', STEP_2, checkpoints['calibrated'], '--target-latency', '0.005'))
    assert 'lat1' in line and 'lat2' in line and '0.01 s' in line and '0.03 s' in line


@pytest.mark.parametrize('option', ['--hard-share', '--target-latency'])
def test_budgets_need_a_calibration(tool, checkpoints, option):
    line = error_of(tool('test', STEP_2, checkpoints['router'], option, '0.02'))
    assert 'tools/calibrate.py' in line


def test_one_budget_at_a_time(tool):
    status, said = tool('test', STEP_2, 'x.pth', '--hard-share', '0.5', '--threshold', '0.5')
    assert status == 2 and 'not allowed with argument' in said.splitlines()[-1]


def test_hard_share_of_a_calibration(tool, checkpoints):
    before = checkpoints['router'].read_bytes()
    line = error_of(tool('calibrate', STEP_2, checkpoints['router'], '--hard-share', '1.5'))
    assert 'in [0, 1]' in line and checkpoints['router'].read_bytes() == before


def test_budgets_are_for_dynamic_detectors(tool, tmp_path, checkpoints):
    (tmp_path / 'stock.py').write_text(
        "_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'"
    )
    for option in ('--hard-share', '--threshold', '--target-latency'):
        line = error_of(tool('test', 'stock.py', checkpoints['router'], option, '0.5'))
        assert line.startswith(f'error: {option} is for dynamic') and 'FasterRCNN' in line
    assert 'DynamicDetector' in error_of(tool('calibrate', 'stock.py', checkpoints['router']))


# Options.


def test_places_that_cannot_be_written(tool, tmp_path, checkpoints):
    (tmp_path / 'file').touch()
    for line in (
        error_of(tool('train', STEP_1, '--work-dir', 'file/run')),
        error_of(tool('test', STEP_2, checkpoints['router'], '--work-dir', 'file')),
        error_of(tool('test', STEP_2, checkpoints['router'], '--out', 'file/found.pkl')),
        error_of(tool('calibrate', STEP_2, checkpoints['router'], '--out', 'file/x.pth')),
    ):
        assert "'file" in line and 'cannot be made' in line
    line = error_of(tool('calibrate', STEP_2, checkpoints['router'], '--out', tmp_path))
    assert 'is a folder' in line


def test_options_that_do_not_fit_the_config(tool):
    line = error_of(tool('train', STEP_1, **{'custom_hooks.9.type': 'RouterHook'}))
    assert '--cfg-options do not fit' in line


@pytest.mark.parametrize('pair', ['load_from', 'a=[1,2', 'a=(1,2'])
def test_options_that_are_no_pairs(tool, pair):
    status, said = tool('train', STEP_1, '--cfg-options', pair)
    assert status == 2 and 'Traceback' not in said
    assert 'error: argument --cfg-options: needs KEY=VALUE' in said.splitlines()[-1]
    assert pair in said.splitlines()[-1]


def test_resuming_from_weights_alone(tool, checkpoints):
    assert 'weights alone' in error_of(tool('train', STEP_1, '--resume', checkpoints['cascade']))


def test_weights_of_torchvision_without_it(tool, tmp_path, monkeypatch):
    """Set-up leaves torchvision out, and many of mmdet's configs start from its weights."""
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    config = tmp_path / 'resnet.py'
    config.write_text(
        f"_base_ = ['{STEP_1}']\n"
        "start = dict(_delete_=True, type='Pretrained', checkpoint='torchvision://resnet50')\n"
        'model = dict(backbone=dict(init_cfg=start))\n'
    )
    line = error_of(tool('train', config, '--no-data-check'))
    assert 'torchvision://' in line and 'install' in line and 'load_from=' in line


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU does it')
def test_amp_without_a_gpu(tool):
    assert '--amp' in error_of(tool('train', STEP_1, '--amp'))


def test_auto_scale_lr_without_a_base(tool):
    assert 'auto_scale_lr.base_batch_size' in error_of(tool('train', STEP_1, '--auto-scale-lr'))


def test_out_must_be_a_pickle(tool, checkpoints):
    line = error_of(tool('test', STEP_2, checkpoints['router'], '--out', 'found.json'))
    assert 'found.json' in line


def test_a_device_that_is_not_there(tool, checkpoints):
    assert 'cuda:77' in error_of(
        tool('calibrate', STEP_2, checkpoints['router'], '--device', 'cuda:77')
    )


# Data.


@pytest.fixture
def data(digits, tmp_path):
    """A copy of the data set, to spoil."""
    return shutil.copytree(digits, tmp_path / 'spoiled')


def edit(root, split, change):
    file = root / f'annotations/instances_{split}.json'
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_missing_data_folder(tool, checkpoints, tmp_path):
    gone = tmp_path / 'gone'
    for name, config, *rest in (
        ['train', STEP_1],
        ['test', STEP_2, checkpoints['router']],
        ['calibrate', STEP_2, checkpoints['router']],
    ):
        assert str(gone) in error_of(tool(name, config, *rest, root=gone))


def test_an_empty_set(tool, data, checkpoints):
    for split in ('train', 'val', 'test'):
        edit(data, split, lambda content: content.update(images=[], annotations=[]))
    for name, config, *rest in (
        ['train', STEP_1],
        ['test', STEP_2, checkpoints['router']],
        ['calibrate', STEP_2, checkpoints['router']],
    ):
        assert 'empty' in error_of(tool(name, config, *rest, root=data))
        assert 'empty' in error_of(tool(name, config, *rest, '--no-data-check', root=data))


def test_a_truncated_picture_is_named(tool, data, checkpoints):
    for split in ('train', 'val', 'test'):
        picture = data / split / '000003.jpg'
        picture.write_bytes(picture.read_bytes()[:500])
    for name, config, *rest in (
        ['train', STEP_1],
        ['test', STEP_2, checkpoints['router']],
        ['calibrate', STEP_2, checkpoints['router']],
    ):
        line = error_of(tool(name, config, *rest, root=data))
        assert '000003.jpg' in line and 'truncated' in line


def spoil_boxes(content):
    first, second, third, fourth = content['annotations'][:4]
    first['bbox'][2] = 0
    second['bbox'][:2] = [500, 500]
    third['category_id'] = 99
    fourth['bbox'] = [50, 50, 40, 40]


def test_odd_annotations_are_said_and_the_run_goes_on(tool, data, checkpoints):
    for split in ('train', 'test'):
        edit(data, split, spoil_boxes)
    for result, said in (
        (tool('train', STEP_1, root=data), 'the training set'),
        (tool('test', STEP_2, checkpoints['router'], root=data), 'the test set'),
    ):
        lines = warnings_of(result)
        assert len(lines) == 4 and all(said in line and '.jpg' in line for line in lines)
        for words in ('zero or negative size', 'wholly outside', 'category_id', 'partly outside'):
            assert sum(words in line for line in lines) == 1, words


def test_images_without_ground_truth_train(tool, data, checkpoints):
    """Among them whole batches of nothing."""

    def spare_two(content):
        content['annotations'] = [
            entry for entry in content['annotations'] if entry['image_id'] < 3
        ]

    edit(data, 'train', spare_two)
    for config in (STEP_1, STEP_2):
        lines = warnings_of(tool('train', config, root=data, load_from=checkpoints['cascade']))
        assert len(lines) == 1 and '10 of 12 images without an annotation' in lines[0]
        state = torch.load(f'work_dirs/{config.stem}/epoch_1.pth')['state_dict']
        assert all(
            value.isfinite().all()
            for key, value in state.items()
            if key not in ('delta', 'gflops', 'latencies')
        )
    assert state['delta'].isfinite()


def test_losses_that_are_not_finite(tool):
    line = error_of(
        tool('train', STEP_1, **{'optim_wrapper.optimizer.lr': 1e30, 'param_scheduler': '[]'})
    )
    assert 'not finite at epoch 1' in line and '.jpg' in line


@pytest.mark.parametrize('threshold', ['-1', '1', '0.5'])
def test_where_nothing_is_found(tool, checkpoints, threshold):
    result = tool(
        'test',
        STEP_2,
        checkpoints['router'],
        f'--threshold={threshold}',
        '--out',
        'found.pkl',
        **{'model.detector.test_cfg.rcnn.score_thr': 1.1},
    )
    assert warnings_of(result) == []
    with open('found.pkl', 'rb') as file:
        found = pickle.load(file)
    assert len(found) == 6 and not any(len(entry['pred_instances']['scores']) for entry in found)


# The command line itself.


def test_a_process_ends_with_the_line(tmp_path):
    done = run_tool('test.py', STEP_2, tmp_path / 'missing.pth')
    assert done.returncode == 2 and 'Traceback' not in done.stdout + done.stderr
    assert (
        done.stderr.strip().splitlines()[-1]
        == f"error: there is no checkpoint at '{tmp_path}/missing.pth'"
    )

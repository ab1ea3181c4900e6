"""All tools on annotation files as users have them."""

import contextlib
import io
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from mmengine.config import Config

from conftest import ROOT, call_tool, shrink_options, write_random
from dynamicdet.reports.routing_analysis_text import BY_CALIBRATION, BY_QUANTILE
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.record import read_record


def spoil(data):
    """Change all that can be mended without a guess."""
    for entry in data['images']:
        entry.update(id=f'img{entry["id"]}', width=str(entry['width']))
    for entry in data['categories']:
        entry.update(id=f'c{entry["id"]}')
    for entry in data['annotations']:
        entry.update(
            id=entry['id'] - 1,
            image_id=f'img{entry["image_id"]}',
            category_id=f'c{entry["category_id"]}',
            bbox=list(map(str, entry['bbox'])),
            area=str(entry['area']),
        )
        entry.pop('iscrowd')


def test_tools_run_through_a_mutant_to_the_ap_of_the_good_file(digits, tmp_path):
    """Train, test, calibrate, record, analyze and report, with all that can be mended at once."""
    root = tmp_path / 'digits'
    shutil.copytree(digits, root)
    for split in ('train', 'val', 'test'):
        path = root / f'annotations/instances_{split}.json'
        data = json.loads(path.read_text())
        spoil(data)
        path.write_text('\ufeff' + json.dumps(data))
    name = 'dy_faster_rcnn_digits_router'
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    cfg.merge_from_dict(shrink_options(digits))
    write_random(cfg, tmp_path / 'random.pth')
    checkpoint = torch.load(tmp_path / 'random.pth')
    # As after step 2.
    checkpoint['state_dict']['delta'].fill_(0.1)
    torch.save(checkpoint, tmp_path / 'random.pth')

    runs = itertools.count()

    def run(tool, data, *arguments, config=name):
        # Random weights propose more than is needed here.
        options = {
            'model.detector.test_cfg.rpn.max_per_img': 20,
            'model.detector.test_cfg.rpn.nms_pre': 40,
            **{key: value for key, value in shrink_options(data).items() if value is not None},
        }
        pairs = [
            f'{key}={json.dumps(value) if isinstance(value, list) else value}'
            for key, value in options.items()
        ]
        # No stream of pytest's, which mmengine's logger would keep beyond this test.
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            assert (
                call_tool(
                    tool,
                    ROOT / f'configs/{config}.py',
                    *arguments,
                    '--cfg-options',
                    'train_cfg.max_epochs=1',
                    'train_cfg.val_interval=1',
                    # Loggers are known by it and the second in which they begin.
                    f'experiment_name=run{next(runs)}',
                    *pairs,
                )
                == 0
            ), out.getvalue()
        return out.getvalue()

    def ap(said):
        return [
            line.split('coco/bbox_mAP: ')[1].split()[0]
            for line in said.splitlines()
            if 'coco/bbox_mAP: ' in line
        ]

    work = ('--work-dir', tmp_path / 'work')
    tested = [
        ap(run('test.py', data, tmp_path / 'random.pth', '--threshold', 0.5, *work))
        for data in (digits, root)
    ]
    assert tested[0] == tested[1] != []
    said = run('train.py', root, *work, config='dy_faster_rcnn_digits')
    assert 'data: the training set: ' in said and 'numbered from 1 in the order of the file' in said
    run('record.py', root, tmp_path / 'random.pth', '--out', tmp_path / 'r.npz', '--view', 'none')
    record = read_record(tmp_path / 'r.npz')
    assert record.provenance['ann_file'] == str(root / 'annotations/instances_test.json')
    mixtures = Mixtures(record, read_truth(str(digits / 'annotations/instances_test.json')))
    assert call_tool('analyze_routing.py', tmp_path / 'r.npz', '--bootstrap', 0) == 0
    ends = json.loads((tmp_path / 'r/routing.json').read_text())['ends']
    assert [one['ap'] for one in ends] == pytest.approx(
        [mixtures.ap([exit] * 6) for exit in range(2)]
    )
    run('calibrate.py', root, tmp_path / 'random.pth')
    said = run('report.py', root, tmp_path / 'random.pth', '--out-dir', tmp_path / 'report')
    assert BY_CALIBRATION in (tmp_path / 'report/report.html').read_text()
    assert BY_CALIBRATION in said and BY_QUANTILE in said
    found = json.loads((tmp_path / 'report/report.json').read_text())
    assert [one['ap'] for one in found['ends']] == [one['ap'] for one in ends]
    assert 'honest' in found['curves'] and len(found['calibrated']) == len(found['rows']) == 11
    # What it recorded can be analyzed again.
    assert (tmp_path / 'report/trade_off.png').stat().st_size
    again = read_record(tmp_path / 'report/record.npz')
    np.testing.assert_array_equal(again.difficulty, record.difficulty)

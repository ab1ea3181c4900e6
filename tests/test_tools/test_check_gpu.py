"""tools/check_gpu.sh: what fails, hangs or cannot run is recorded, and the rest goes on. The steps
take minutes."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT

SAYS = ('-c', 'print("words"); import json; json.dump(dict(rows=1), open("says.json", "w"))')
FAILS = ('-c', 'print("before"); raise ValueError("the reason")')
#: A step, and a process of its own, that would write later.
HANGS = (
    '-c',
    'import subprocess, sys; subprocess.run([sys.executable, "-c", '
    "\"import time; time.sleep(2); open('late', 'w')\"])",
)


@pytest.fixture
def check(monkeypatch, tmp_path):
    """run.py as a module, and ``check(steps)``, which runs these for ``tmp_path``."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools/check_gpu'))
    # Other tools have files of these names.
    for name in ('run', 'steps'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run
    import steps

    monkeypatch.setattr(sys, 'argv', ['run.py', '--work-dir', str(tmp_path / 'a folder')])

    def main(chosen=None):
        if chosen is not None:
            monkeypatch.setattr(
                run, 'all_steps', lambda gpu, provider: [steps.Step(*own) for own in chosen]
            )
            monkeypatch.setattr(run, 'table', lambda machine, results: '')
        return run.main()

    main.run, main.steps, main.folder = run, steps, tmp_path / 'a folder'
    yield main
    for name in ('run', 'steps'):
        sys.modules.pop(name)


def read(folder):
    content = json.loads((folder / 'check_gpu.json').read_text())
    return content, {step.pop('step'): step for step in content['steps']}


def test_what_fails_is_recorded_and_the_rest_goes_on(check, monkeypatch, capsys):
    monkeypatch.setattr(check.run, 'PATIENCE', 0.02)
    monkeypatch.setattr(check.run, 'WHOLE', 1e6)
    chosen = [
        ('fails', FAILS, (), False, False, 3000),
        ('blocked', SAYS, ('fails',)),
        ('hangs', HANGS, (), False, False, 50),
        ('says', SAYS, (), False, False, 3000),
    ]
    # Twice into the same folder.
    for _ in range(2):
        assert check(chosen) == 1
        content, steps = read(check.folder)
        assert content['complete'] and list(steps) == ['fails', 'blocked', 'hangs', 'says']
        assert (steps['fails']['status'], steps['fails']['error']) == (
            'failed',
            'ValueError: the reason',
        )
        assert (steps['blocked']['status'], steps['blocked']['error']) == (
            'left out',
            'needs fails',
        )
        assert steps['hangs']['status'] == 'failed' and 'longer than 1 s' in steps['hangs']['error']
        assert steps['says']['status'] == 'passed' and steps['says']['figures'] == dict(rows=1)
        assert (check.folder / 'steps/says.log').read_text() == 'words\n'
    assert '2 failed' in capsys.readouterr().out
    time.sleep(2)
    assert not (check.folder / 'steps/late').exists()


def test_without_a_gpu_its_steps_are_named(check, monkeypatch, capsys):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert check([('for a GPU', FAILS, (), True), ('says', SAYS)]) == 0
    assert read(check.folder)[1]['for a GPU']['error'] == 'torch sees no GPU'
    assert 'for a GPU: left out, torch sees no GPU' in capsys.readouterr().out


def test_the_table_of_nothing(check):
    """Where every step has failed."""
    machine = dict(
        gpu=None, torch='2', cuda=None, onnxruntime='1', providers=['CPUExecutionProvider']
    )
    results = {
        step.name: dict(status='failed', error='why', figures={})
        for step in check.steps.all_steps(False, 'CPU')
    }
    table = check.run.table(machine, results)
    assert table.count('failed: ') == len(results)
    assert (
        'left out: CUDAExecutionProvider in test_exported' in table
        and 'float16 in timings' in table
    )


def test_two_at_once_and_folders_that_are_none(check, capsys):
    check.folder.mkdir()
    with open(check.folder / '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            check()
    assert 'another check is running' in capsys.readouterr().err
    sys.argv[-1] = str(check.folder / '.lock/inside')
    with pytest.raises(SystemExit) as ended:
        check()
    assert ended.value.code == 2 and capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('gpu', [False, True])
def test_steps_name_tools_that_are_there_and_steps_that_came_before(check, gpu):
    before = set()
    for step in check.steps.all_steps(gpu, 'CPUExecutionProvider'):
        assert set(step.needs) <= before and step.name not in before
        before.add(step.name)
        files = [part for part in step.command if part.startswith(('tools/', 'configs/'))]
        assert all((ROOT / part).is_file() for part in files) and (files or step.command[0] == '-m')
    for name, base in check.steps.BASES.items():
        assert (ROOT / 'configs' / base).is_file() and name in check.steps.CONFIGS


def test_no_python_and_missing_packages_are_one_line(tmp_path):
    """A copy of the scripts without .venv, and a Python that has nothing."""
    script = tmp_path / 'a clone/tools/check_gpu.sh'
    script.parent.mkdir(parents=True)
    script.write_bytes((ROOT / 'tools/check_gpu.sh').read_bytes())
    for name in ('run.py', 'steps.py'):
        (script.parent / 'check_gpu').mkdir(exist_ok=True)
        (script.parent / 'check_gpu' / name).write_bytes(
            (ROOT / 'tools/check_gpu' / name).read_bytes()
        )
    tools = tmp_path / 'bin'
    tools.mkdir()
    for name in ('dirname', 'bash'):
        (tools / name).symlink_to(f'/usr/bin/{name}')
    done = subprocess.run(
        ['/bin/bash', script], env=dict(PATH=str(tools)), capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith('error: there is no Python: ')
    (tools / 'python').write_text(f'#!/bin/bash\nexec "{Path(sys.executable).resolve()}" -S "$@"\n')
    (tools / 'python').chmod(0o755)
    done = subprocess.run(
        ['/bin/bash', script], env=dict(PATH=str(tools)), capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and ' lacks torch, mmengine' in done.stderr
        and done.stderr.count('\n') == 1
    )
    assert not (tmp_path / 'a clone/work_dirs').exists()

"""Which versions of Python, torch and OpenMMLab the package works with, and the table that says so.

    python experiments/compatibility.py                        # all sets below, hours; kept if done
    python experiments/compatibility.py --only 3.12-2.13.0-openmmlab

Each set gets a virtual environment of its own in work_dirs/compatibility, mmcv compiled for its
torch, and the tests of `TESTS`. What came out is in experiments/results/compatibility.json, with
the versions that pip chose; the table in docs/install.md is written from it.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results' / 'compatibility.json'
PAGE = ROOT / 'docs' / 'install.md'
MARKS = '<!-- compatibility -->', '<!-- /compatibility -->'
#: Models, checkpoints, the main job by its command lines, and files without OpenMMLab.
TESTS = (
    'tests/test_models/test_dynamic_detector.py',
    'tests/test_checkpoints.py',
    'tests/test_tools/test_main_job.py',
    'tests/test_layout.py',
)
STACKS = {
    'openmmlab': ('mmengine>=0.10.7,<0.11', 'mmcv==2.1.0', 'mmdet>=3.3.0,<3.4'),
    'onedl': ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'imaug'),
}


class Environment(NamedTuple):
    """A set of versions that is tried."""

    python: str
    torch: str
    stack: str

    @property
    def name(self) -> str:
        """Such as '3.11-2.13.0-openmmlab'."""
        return '-'.join(self)


ENVIRONMENTS = (
    Environment('3.11', '2.13.0', 'openmmlab'),
    Environment('3.12', '2.13.0', 'openmmlab'),
    Environment('3.13', '2.13.0', 'openmmlab'),
    Environment('3.11', '2.14.1', 'openmmlab'),
    Environment('3.11', '2.13.0', 'onedl'),
)


def try_environment(environment: Environment, folder: Path) -> dict:
    """Set one up and run the tests in it.

    Returns:
        dict: ``outcome`` ('works', or what failed), ``tests`` (pytest's last line), ``versions``,
            ``minutes``.
    """
    start, log = time.monotonic(), folder / 'log.txt'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python = folder / 'bin' / 'python'

    def run(
        *command: object, timeout: int = 5400, **environment: str
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [*map(str, command)],
            cwd=ROOT,
            env={**os.environ, 'PYTHONPATH': '', **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        with log.open('a') as file:
            file.write(f'$ {" ".join(map(str, command))}\n{done.stdout}\n')
        return done

    pip = (python, '-m', 'pip', 'install', '--no-input')
    compiler = dict(
        CXX=str(ROOT / 'tools' / 'cxx_with_precompiled_header.sh'), MMCV_WITH_OPS='1', MAX_JOBS='2'
    )
    names = ('mm-deps', 'compression', 'deploy', 'openvino', 'video', 'tests')
    files = [part for name in names for part in ('-r', f'requirements/{name}.txt')]
    steps = {
        'python': (f'python{environment.python}', '-m', 'venv', '--clear', folder),
        'torch': (*pip, f'torch=={environment.torch}', '-r', 'requirements/build.txt'),
        'libraries': (*pip, 'numpy', 'pycocotools', 'matplotlib', 'scikit-learn', 'scikit-image',
                      'jinja2', *files),
        'mmcv': (*pip, '--no-deps', '--no-build-isolation', '--no-cache-dir', *STACKS[environment.stack]),
        'package': (*pip, '--no-deps', '--no-build-isolation', '-e', '.'),
    }  # fmt: skip
    outcome, tests = 'works', ''
    for step, command in steps.items():
        if run(*command, **compiler).returncode:
            outcome = f'{step} cannot be installed'
            break
    else:
        done = run(python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *TESTS)
        tests = next(
            (line for line in reversed(done.stdout.splitlines()) if ' in ' in line), 'no result'
        ).strip('= ')
        outcome = 'works' if done.returncode == 0 else 'tests fail'
    return dict(
        outcome=outcome,
        tests=tests,
        versions=versions_in(python) if python.exists() else {},
        minutes=round((time.monotonic() - start) / 60, 1),
        machine=f'{platform.machine()}, {os.cpu_count()} cores',
        date=time.strftime('%Y-%m-%d'),
    )


def versions_in(python: Path) -> dict:
    """Versions of what matters in an environment, by name."""
    listed = subprocess.run(
        [python, '-m', 'pip', 'list', '--format', 'json'], capture_output=True, text=True
    )
    wanted = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmdet', *STACKS['onedl'])
    packages = json.loads(listed.stdout or '[]')
    return {
        package['name']: package['version'] for package in packages if package['name'] in wanted
    }


def make_table(results: dict) -> str:
    """The table of docs/install.md."""
    rows = ['| Python | torch | OpenMMLab | result | tests |', '|---|---|---|---|---|']
    for environment in ENVIRONMENTS:
        result = results.get(environment.name)
        if result:
            versions = result['versions']
            stack = (
                ', '.join(f'{name} {version}' for name, version in versions.items() if 'mm' in name)
                or environment.stack
            )
            torch = versions.get('torch', environment.torch)
            row = (environment.python, torch, stack, result['outcome'], result['tests'])
            rows.append(f'| {" | ".join(row)} |')
    return '\n'.join(rows)


def write_page(results: dict) -> None:
    """Write the table between the marks of docs/install.md."""
    text = PAGE.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f'{before}{MARKS[0]}\n{make_table(results)}\n{MARKS[1]}{after}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--only',
        nargs='+',
        choices=[environment.name for environment in ENVIRONMENTS],
        help='sets to try anew',
    )
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for environment in ENVIRONMENTS:
        if environment.name in args.only if args.only else environment.name not in results:
            print(f'{environment.name} ...', flush=True)
            folder = ROOT / 'work_dirs' / 'compatibility' / environment.name
            results[environment.name] = try_environment(environment, folder)
            print(
                f'   {results[environment.name]["outcome"]}: {results[environment.name]["tests"]}',
                flush=True,
            )
            RESULTS.write_text(json.dumps(results, indent=1) + '\n')
            shutil.rmtree(folder / 'lib', ignore_errors=True)
    write_page(results)


if __name__ == '__main__':
    main()

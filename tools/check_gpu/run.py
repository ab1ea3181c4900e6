"""Check everything on this machine's GPU, in at most 8 minutes: trains, resumes, calibrates, tests
and exports by the real tools on a small copy of the built-in data, compares AP and boxes with the
CPU's, counts what makes the CPU wait for the GPU, and times exits. Without a GPU, what needs one is
left out, and said.

Writes check_gpu.json, also while it runs, and a table to the screen; exit status 1 if anything
failed.
"""

import argparse
import ctypes
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from steps import BASES, BUDGETS, CONFIGS, Step, all_steps

ROOT = Path(__file__).resolve().parents[2]
#: What is needed, and what says how to get it.
MODULES = (
    'torch',
    'mmengine',
    'mmcv',
    'mmdet',
    'dynamicdet',
    'pytest',
    'sklearn',
    'skimage',
    'onnx',
    'onnxruntime',
    'av',
)
#: What runs exported detectors on a GPU.
PROVIDER = 'CUDAExecutionProvider'
#: Seconds for all steps together where there is a GPU.
WHOLE = 480
#: How much longer a step may take without one.
PATIENCE = 20
_LIBC = ctypes.CDLL(None)
PASSED, FAILED, LEFT_OUT = 'passed', 'failed', 'left out'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--work-dir',
        default=str(ROOT / 'work_dirs/check_gpu'),
        help='where results go: work_dirs/check_gpu of the repository',
    )
    return parser.parse_args()


def refuse(reason: object) -> NoReturn:
    """End with a line that says why, and exit status 2."""
    print(f'error: {reason}', file=sys.stderr)
    sys.exit(2)


def require_modules() -> None:
    """Refuse to start where a package is missing."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        refuse(
            f"{sys.executable} lacks {', '.join(missing)}: 'make setup' makes an environment that "
            'has all; '
            'docs/install.md'
        )


def prepare(folder: Path):
    """An empty folder for the steps, and the lock that keeps others out as long as this process
    lives."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / '.lock', 'w')
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder / 'steps', ignore_errors=True)
        (folder / 'steps').mkdir()
    except BlockingIOError:
        refuse(
            f"another check is running in '{folder}': wait for it, or name another folder by "
            '--work-dir'
        )
    except OSError as error:
        refuse(f"'{folder}' cannot be written to: {error}; name another folder by --work-dir")
    for name, content in CONFIGS.items():
        (folder / 'steps' / name).write_text(
            f'_base_ = {str(ROOT / "configs" / BASES[name])!r}\n{content}'
        )
    return lock


def describe_machine() -> dict[str, Any]:
    """Processor, GPU and versions, for the results."""
    import onnxruntime
    import torch

    gpu = torch.cuda.is_available()
    return dict(
        gpu=torch.cuda.get_device_name() if gpu else None,
        capability=torch.cuda.get_device_capability() if gpu else None,
        python=sys.version.split()[0],
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cores=os.cpu_count(),
        cudnn=torch.backends.cudnn.version() if gpu else None,
        onnxruntime=onnxruntime.__version__,
        providers=onnxruntime.get_available_providers(),
        date=time.strftime('%Y-%m-%dT%H:%M:%S'),
    )


def die_with_parent() -> None:
    """In a new process: end when this one ends, even by SIGKILL. PR_SET_PDEATHSIG is 1
    (prctl(2))."""
    _LIBC.prctl(1, signal.SIGKILL)


def execute(step: Step, folder: Path, limit: float) -> str:
    """Run a step in a session of its own.

    Returns:
        str: What went wrong, in one line; empty if nothing did.
    """
    command = [
        str(ROOT / part) if part.startswith(('tools/', 'configs/')) or part == 'tests' else part
        for part in step.command
    ]
    environment = {
        **os.environ,
        'PYTHONHASHSEED': '0',
        **({'CUDA_VISIBLE_DEVICES': '-1'} if step.hidden else {}),
    }
    log = folder / f'{step.name}.log'
    with open(log, 'w') as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f'took longer than {limit:.0f} s'
        finally:
            # Its data workers, too.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    lines = [line.strip() for line in log.read_text(errors='replace').splitlines() if line.strip()]
    return '' if status == 0 else (lines or [''])[-1][:300] or f'ended with status {status}'


def figures_of(step: Step, folder: Path) -> dict[str, Any]:
    """What a step has measured: its own JSON, or the metrics in the log of a run of mmengine's."""
    own = folder / f'{step.name}.json'
    logs = [own] if own.is_file() else sorted((folder / 'work_dirs' / step.name).glob('2*/2*.json'))
    lines = logs[-1].read_text().splitlines() if logs else []
    try:
        content = json.loads(lines[-1] if lines else '{}')
    except ValueError:
        # Of a step that was stopped while it wrote.
        return {}
    return (
        content
        if logs == [own]
        else {name: value for name, value in content.items() if name.startswith('coco/')}
    )


def reason_to_leave_out(step: Step, results: dict[str, dict], gpu: bool) -> str:
    """Why a step is not run; empty if it is."""
    if step.gpu and not gpu:
        return 'torch sees no GPU'
    missing = [name for name in step.needs if results[name]['status'] != PASSED]
    return f'needs {", ".join(missing)}' if missing else ''


def run_steps(folder: Path, machine: dict[str, Any]) -> dict[str, dict]:
    """All steps, each recorded as soon as it has ended."""
    gpu, start, results = machine['gpu'] is not None, time.monotonic(), {}
    steps = all_steps(
        gpu, PROVIDER if gpu and PROVIDER in machine['providers'] else 'CPUExecutionProvider'
    )
    for number, step in enumerate(steps, 1):
        began = time.monotonic()
        print(
            f'[{number:2}/{len(steps)}] {began - start:4.0f} s  {step.name}: ', end='', flush=True
        )
        error = reason_to_leave_out(step, results, gpu)
        status = LEFT_OUT
        if not error:
            left = WHOLE - (began - start) if gpu else float('inf')
            limit = min(left, step.limit * (1 if gpu else PATIENCE))
            error = (
                execute(step, folder / 'steps', limit)
                if limit >= 1
                else f'no time was left of {WHOLE} s'
            )
            status = FAILED if error else PASSED
        results[step.name] = dict(
            status=status,
            seconds=round(time.monotonic() - began, 1),
            error=error,
            figures=figures_of(step, folder / 'steps'),
        )
        print(
            status + (f', {error}' if error else f', {results[step.name]["seconds"]} s'), flush=True
        )
        write(folder, machine, results, number == len(steps))
    return results


def write(folder: Path, machine: dict[str, Any], results: dict[str, dict], complete: bool) -> None:
    """Write results so far as check_gpu.json."""
    content = dict(
        complete=complete,
        machine=machine,
        steps=[dict(step=name, **own) for name, own in results.items()],
    )
    temporary = folder / '.check_gpu.json'
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, folder / 'check_gpu.json')


def table(machine: dict[str, Any], results: dict[str, dict]) -> str:
    """All figures as plain text."""
    figures = {name: own['figures'] for name, own in results.items()}
    aps = {
        share: figures[f'test_{share:g}'].get('coco/bbox_mAP', float('nan')) for share in BUDGETS
    }
    lines = [
        f'{machine["gpu"] or "no GPU: on the CPU"}; torch {machine["torch"]}, CUDA '
        f'{machine["cuda"]}, ONNX Runtime {machine["onnxruntime"]}'
    ]
    lines += ['', 'AP on the training pictures, by share of hard images'] + [
        f'  {share:<40g}{100 * ap:>8.1f}' for share, ap in aps.items()
    ]
    for name in ('compare', 'compare_exported', 'compare_video'):
        lines += [''] + comparisons(figures[name]) if figures[name] else []
    if figures['syncs']:
        lines += ['', f'{"waits for the GPU, per image":<42}{"batch 1":>8}{"batch 8":>8}'] + [
            f'  {name:<40}' + ''.join(f'{own[size]:>8.1f}' for size in sorted(own))
            for name, own in figures['syncs']['waits'].items()
        ]
    for own in figures['timings'].get('runs', ()):
        lines += ['', f'{own["title"]:<60}{"ms/image":>9}{"quartiles":>18}{"/ stock":>9}'] + [
            f'  {name:<58}{one["median"]:>9.2f}{one["q1"]:>10.2f} to '
            f'{one["q3"]:<6.2f}{one["ratio"]:>7.3f}'
            for name, one in own['rows'].items()
        ]
    lines += ['', *parts_left_out(machine)]
    lines += [
        f'{status}: {name}, {own["error"]}'
        for status in (LEFT_OUT, FAILED)
        for name, own in results.items()
        if own['status'] == status
    ]
    return '\n'.join(lines)


def parts_left_out(machine: dict[str, Any]) -> list[str]:
    """What no step of its own is for."""
    reason = 'torch sees no GPU' if machine['gpu'] is None else 'onnxruntime-gpu is not installed'
    cuda = machine['gpu'] is not None and PROVIDER in machine['providers']
    return [f'{LEFT_OUT}: {PROVIDER} in test_exported and compare_exported, {reason}'] * (
        not cuda
    ) + [f'{LEFT_OUT}: real sizes, batch 16 and float16 in timings, {reason}'] * (
        machine['gpu'] is None
    )


def comparisons(figures: dict[str, Any]) -> list[str]:
    """Rows of detections that were compared."""
    return [
        f'{figures["title"]:<42}{"AP":>8}{"AP":>8}{"boxes, pixels":>15}{"scores":>9}'
        f'{"unmatched":>11}'
    ] + [
        f'  {name:<40}'
        + ''.join(f'{"" if ap is None else format(ap, ".1f"):>8}' for ap in own['ap'])
        + f'{own["box"]:>15.4f}{own["score"]:>9.4f}{own["unmatched"]:>11.1%}'
        for name, own in figures['rows'].items()
    ]


def main() -> int:
    """Run all steps; 1 if one failed."""
    args = parse_args()
    require_modules()
    folder = Path(args.work_dir).absolute()
    # Held until this process ends.
    lock = prepare(folder)  # noqa: F841
    machine, start = describe_machine(), time.monotonic()
    results = run_steps(folder, machine)
    counts = {
        status: sum(own['status'] == status for own in results.values())
        for status in (PASSED, FAILED, LEFT_OUT)
    }
    print('\n' + table(machine, results))
    said = ', '.join(f'{count} {status}' for status, count in counts.items())
    print(
        f'\n{said}, in {time.monotonic() - start:.0f} s; written to '
        f'{folder / "check_gpu.json"}, what steps said to {folder / "steps"}'
    )
    return 1 if counts[FAILED] else 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit('\ninterrupted')

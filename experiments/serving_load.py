"""A server under rising load: fixed easy, fixed hard, and controlled.

The small YOLOX of the built-in data (random weights: what is measured is time) is served by
tools/serve.py in three ways, which take turns. Pictures come at random moments, as many per second as the hard
path can serve times a factor up to 3; nobody waits for an answer before the next is sent. The client
is a process of its own and shares the machine's cores with the server.

Writes experiments/results/serving_load.json and docs/images/serving_load.png.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config

import dynamicdet  # noqa: F401
from dynamicdet.datasets.digits import make_digits
from dynamicdet.files import write_atomically
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/dy_yolox_nano_digits.py'
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--target-latency', type=float, default=0.25, help='seconds: 0.25')
    parser.add_argument('--seconds', type=float, default=8.0, help='of each load: 8')
    parser.add_argument('--seed', type=int, default=0, help='of the arrivals and weights: 0')
    parser.add_argument('--work-dir', default='work_dirs/serving_load')
    parser.add_argument('--out', default=str(ROOT / 'experiments/results/serving_load.json'))
    parser.add_argument('--figure', default=str(ROOT / 'docs/images/serving_load.png'))
    return parser.parse_args()


def make_detector(folder: Path, seed: int) -> tuple[Path, list[bytes]]:
    """A checkpoint and pictures."""
    register_all_modules(init_default_scope=True)
    checkpoint = folder / 'random.pth'
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / 'digits'
    if not data.is_dir():
        make_digits(data, dict(train=1, val=1, test=100))
    torch.manual_seed(seed)
    model = MODELS.build(Config.fromfile(CONFIG).model)
    model.init_weights()
    # Difficulties that differ.
    model.router.fc2.weight.data *= 30
    torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
    return checkpoint, [path.read_bytes() for path in sorted((data / 'test').glob('*.*'))]


class Server:
    """A process of tools/serve.py."""

    def __init__(self, checkpoint: Path, *options: str) -> None:
        command = [sys.executable, str(ROOT / 'tools/serve.py'), str(CONFIG), str(checkpoint)]
        self.process = subprocess.Popen(
            [*command, '--port', '0', *options], stdout=subprocess.PIPE, text=True
        )
        for line in self.process.stdout:
            if line.startswith('serving on '):
                self.port = int(line.rpartition(':')[2])
                return
        raise SystemExit('the server did not start')

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(120):
            raise SystemExit('the server failed')


class Client:
    """Requests over connections that are kept: HTTP with as little of the client's time as can
    be."""

    def __init__(self, port: int) -> None:
        self.port, self.idle = port, []

    async def ask(self, data: bytes) -> tuple[int, dict]:
        reader, writer = self.idle.pop() if self.idle else await self._connect()
        head = (
            'POST /detect?min_score=0.9 HTTP/1.1\r\nHost: here\r\nContent-Type: image/jpeg\r\n'
            f'Content-Length: {len(data)}\r\n\r\n'
        )
        writer.write(head.encode() + data)
        lines = (await reader.readuntil(b'\r\n\r\n')).decode().lower().split('\r\n')
        fields = dict(line.split(': ', 1) for line in lines[1:] if line)
        body = await reader.readexactly(int(fields['content-length']))
        if fields.get('connection') == 'close':
            writer.close()
        else:
            self.idle.append((reader, writer))
        return int(lines[0].split()[1]), json.loads(body)

    async def _connect(self) -> tuple:
        return await asyncio.open_connection('127.0.0.1', self.port)


async def capacity(port: int, pictures: list[bytes], seconds: float = 2.0) -> float:
    """Pictures per second that eight clients get, who each wait for their answer."""
    client, end, count = Client(port), time.monotonic() + seconds, 0

    async def one(number: int) -> None:
        nonlocal count
        while time.monotonic() < end:
            status, _ = await client.ask(pictures[number % len(pictures)])
            assert status == 200
            count, number = count + 1, number + 8

    await asyncio.gather(*map(one, range(8)))
    return count / seconds


async def run_load(port: int, pictures: list[bytes], rate: float, seconds: float, seed: int):
    """Send at random moments; what came back."""
    chance, client, answers = random.Random(seed), Client(port), []
    begin = time.monotonic()

    async def one(number: int, due: float) -> None:
        status, content = await client.ask(pictures[number % len(pictures)])
        answers.append((status, time.monotonic() - begin - due, content.get('exit')))

    tasks, due = [], 0.0
    while (due := due + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, begin + due - time.monotonic()))
        # From when it was to be sent: a client that is late hides nothing.
        tasks.append(asyncio.create_task(one(len(tasks), due)))
    await asyncio.gather(*tasks)
    took = time.monotonic() - begin
    times = sorted(seconds for status, seconds, _ in answers if status == 200)
    exits = [exit for status, _, exit in answers if status == 200]
    quantile = lambda share: times[min(int(share * len(times)), len(times) - 1)] if times else None
    return dict(
        rate=rate,
        sent=len(tasks),
        answered=len(times),
        refused=sum(status == 429 for status, _, _ in answers),
        lost=len(tasks) - sum(status in (200, 429) for status, _, _ in answers),
        throughput=len(times) / took,
        p50=quantile(0.5),
        p95=quantile(0.95),
        p99=quantile(0.99),
        hard_share=sum(exits) / len(exits) if exits else None,
    )


def draw(result: dict, path: str) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    styles = dict(easy=('#2a7', 'fixed easy'), hard=('#c43', 'fixed hard'))
    styles['controlled'] = ('#25c', 'controlled')
    for mode, (color, label) in styles.items():
        points = result['modes'][mode]
        load = [point['factor'] for point in points]
        axes[0].plot(load, [point['p95'] for point in points], 'o-', color=color, label=label)
        axes[1].plot(load, [point['throughput'] for point in points], 'o-', color=color)
        shares = [point['refused'] / point['sent'] for point in points]
        axes[2].plot(load, shares, 'o--', color=color, mfc='none')
        if mode == 'controlled':
            axes[2].plot(load, [point['hard_share'] for point in points], 'o-', color=color)
    axes[0].axhline(result['target_latency'], color='gray', lw=1, ls=':')
    axes[0].set(yscale='log', ylabel='p95 of the answers, seconds')
    axes[0].legend(frameon=False)
    axes[1].set(ylabel='answers per second')
    axes[2].set(ylabel='share: hard (line), refused (dashed)', ylim=(-0.03, 1.03))
    for axis in axes:
        axis.set(xlabel='load, in what the hard path serves')
        axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def main():
    args = parse_args()
    checkpoint, pictures = make_detector(Path(args.work_dir), args.seed)
    options = dict(
        hard=['--threshold', '-1'],
        easy=['--threshold', '1'],
        controlled=['--target-latency', str(args.target_latency)],
    )
    # They take turns at each load, so that what disturbs the machine disturbs all of them.
    servers = {mode: Server(checkpoint, *given) for mode, given in options.items()}
    try:
        modes = {mode: [] for mode in servers}
        for number, factor in enumerate(FACTORS):
            # Anew each time: other programs come and go.
            load = {
                mode: asyncio.run(capacity(servers[mode].port, pictures))
                for mode in ('hard', 'easy')
            }
            print(load, flush=True)
            for mode, server in servers.items():
                point = asyncio.run(
                    run_load(
                        server.port,
                        pictures,
                        factor * load['hard'],
                        args.seconds,
                        args.seed + number,
                    )
                )
                modes[mode].append(dict(factor=factor, capacity=load, **point))
                print(mode, json.dumps(modes[mode][-1]), flush=True)
    finally:
        for server in servers.values():
            server.end()
    result = dict(
        command=' '.join(['python', 'experiments/serving_load.py', *sys.argv[1:]]),
        machine=f'{platform.machine()}, {len(os.sched_getaffinity(0))} core(s) for client and server',
        torch=torch.__version__,
        threads=os.environ.get('OMP_NUM_THREADS'),
        # More than there are cores: other programs ran.
        load_average=os.getloadavg(),
        target_latency=args.target_latency,
        modes=modes,
    )
    write_atomically((json.dumps(result, indent=1) + '\n').encode(), args.out)
    draw(result, args.figure)


if __name__ == '__main__':
    main()

"""Write a checkpoint as a compressed one (.ddz), which loads wherever a checkpoint does.

Without --int8, --codebook and --binary every weight comes back bit for bit: zeros of pruned weights
are stored as bits, weights that are shared already by a table. The optimizer's state is left out.
"""

import argparse
from collections import Counter
from pathlib import Path

from dynamicdet_options import ConfigOptions


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', metavar='CKPT', help='a checkpoint, compressed or not')
    parser.add_argument('--out', required=True, help='file to write; its name ends in .ddz')
    parser.add_argument(
        '--int8',
        nargs='*',
        metavar='PATTERN',
        help='store weights as integers of 8 bits, one scale per channel; with patterns of keys '
        "('backbone.*'), only those",
    )
    parser.add_argument(
        '--codebook',
        nargs='+',
        metavar=('BITS', 'PATTERN'),
        help='let the weights of a layer share 2^BITS values, found by k-means; BITS is 2 to 8',
    )
    parser.add_argument(
        '--binary',
        nargs='+',
        metavar='PATTERN',
        help='store of weights only their signs, and one scale per channel, the mean magnitude',
    )
    parser.add_argument('--report', action='store_true', help='print a table of blocks')
    parser.add_argument(
        '--config',
        help="the detector's config: --report, with AP on its test set and latency (batch 1, "
        'median, in turns) of the checkpoint and of what the file holds',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, help='override settings of the config'
    )
    parser.add_argument('--device', default='cpu', help='where --config measures')
    parser.add_argument(
        '--entropy',
        action='store_true',
        help="print what zstd, as in the file, and Huffman's code make of each kind of stream",
    )
    parser.add_argument(
        '--group',
        action='append',
        metavar='NAME=PATTERN,...',
        help="a row of the table, such as heads='rpn_head,roi_head'; again for more. two-stage "
        'stands for backbone with neck, proposals and RoI heads. Else rows go by first names',
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='say what would be written; write nothing'
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from mmengine.config import Config

from dynamicdet import cli
from dynamicdet.compression import entropy
from dynamicdet.compression.ddz import (
    Compressed,
    compress,
    decompress,
    require_suffix,
    write_compressed,
)
from dynamicdet.compression.encoding import Lossy
from dynamicdet.compression.size_report import TWO_STAGE, BlockSize, block_sizes, compression_table
from dynamicdet.errors import UsageError
from dynamicdet.measuring.accuracy_and_latency import measure_detectors


def lossy_from(args: argparse.Namespace) -> Lossy:
    """What --int8, --codebook and --binary ask for."""
    if args.codebook is None:
        return Lossy(int8=args.int8, binary=args.binary)
    try:
        bits = int(args.codebook[0])
    except ValueError:
        raise UsageError(
            f"--codebook begins with a number of bits, not with '{args.codebook[0]}'"
        ) from None
    return Lossy(int8=args.int8, codebook=bits, codebook_keys=args.codebook[1:], binary=args.binary)


def groups_from(given: list[str] | None) -> dict[str, list[str]]:
    """What --group asks for."""
    groups: dict[str, list[str]] = {}
    for text in given or []:
        name, equals, patterns = text.partition('=')
        if text == 'two-stage':
            groups.update(TWO_STAGE)
        elif not equals or not name or not patterns:
            raise UsageError(f"--group needs NAME=PATTERN,... or two-stage; got '{text}'")
        else:
            groups[name] = patterns.split(',')
    return groups


def config_from(args: argparse.Namespace) -> Config | None:
    """The config to measure on, if one is given."""
    if not args.config:
        return None
    cfg = cli.load_config(args)
    cli.require_settings(cfg, 'test_dataloader', 'test_evaluator')
    cli.require_device(args.device)
    cli.check_data(cfg, 'test')
    return cfg


def report(
    args: argparse.Namespace,
    cfg: Config | None,
    checkpoint: dict,
    compressed: Compressed,
    sizes: list[BlockSize],
) -> list[str]:
    """The table of blocks; with what the detectors are worth if there is a config."""
    size = len(compressed.content)
    if cfg is None:
        return compression_table(sizes, size)
    states = dict(
        original=checkpoint['state_dict'], compressed=decompress(compressed.content)['state_dict']
    )
    worth = measure_detectors(cfg, states, cli.progress, args.device)
    before = Path(args.checkpoint).stat().st_size if Path(args.checkpoint).is_file() else 0
    return compression_table(sizes, size, worth['compressed'], worth['original'], before)


def main() -> None:
    """Compress or unpack a checkpoint, or print its table."""
    args = parse_args()
    cli.prepare()
    require_suffix(args.out)
    lossy, groups, cfg = lossy_from(args), groups_from(args.group), config_from(args)
    checkpoint = cli.require_checkpoint(args.checkpoint)
    if (
        Path(args.out).exists()
        and Path(args.checkpoint).exists()
        and Path(args.out).samefile(args.checkpoint)
    ):
        raise UsageError(f"--out would overwrite '{args.checkpoint}'")
    if not args.dry_run:
        cli.require_writable(args.out)
    # Before the work: a pattern may match nothing.
    block_sizes(checkpoint['state_dict'], groups=groups)
    compressed = compress(checkpoint, lossy)
    sizes = block_sizes(checkpoint['state_dict'], compressed.entries, groups)
    lines = report(args, cfg, checkpoint, compressed, sizes) if args.report or cfg else []
    lines += (
        entropy.stream_table(entropy.compare_stream_sizes(compressed.entries))
        if args.entropy
        else []
    )
    if not args.dry_run:
        write_compressed(compressed, args.out)
    counts = Counter(entry.row['encoding'] for entry in compressed.entries)
    lines.append(
        'entries: ' + ', '.join(f'{count} {name}' for name, count in sorted(counts.items()))
    )
    if compressed.dropped:
        lines.append('left out: ' + ', '.join(compressed.dropped))
    dense = 4e-6 * sum(size.parameters for size in sizes)
    size = len(compressed.content)
    print(*lines, sep='\n')
    print(
        f'{"would write" if args.dry_run else "written to"} {args.out}: {size} bytes '
        f'({size / 1e6:.2f} MB), {size / 1e6 / dense:.1%} of {dense:.2f} MB in float32'
    )


if __name__ == '__main__':
    cli.run(main)

"""Write a checkpoint as a compressed one (.ddz), which loads wherever a checkpoint does.

Without --int8 and --codebook every weight comes back bit for bit: zeros of pruned weights are stored as bits,
weights that are shared already by a table. The optimiser's state is left out.
"""
import argparse
from pathlib import Path
from typing import Dict, List, Optional

from dynamicdet.apis import cli
from dynamicdet.compression.checkpoint import Lossy, compress, require_suffix, write_compressed
from dynamicdet.compression.report import TWO_STAGE, block_sizes, table
from dynamicdet.errors import UsageError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', metavar='CKPT', help='a checkpoint, compressed or not')
    parser.add_argument('--out', required=True, help='file to write; its name ends in .ddz')
    parser.add_argument(
        '--int8',
        nargs='*',
        metavar='PATTERN',
        help='store weights as integers of 8 bits, one scale per channel; with patterns of keys '
        "('backbone.*'), only those")
    parser.add_argument(
        '--codebook',
        nargs='+',
        metavar=('BITS', 'PATTERN'),
        help='let the weights of a layer share 2^BITS values, found by k-means; BITS is 2 to 8')
    parser.add_argument('--report', action='store_true', help='print a table of blocks')
    parser.add_argument(
        '--group',
        action='append',
        metavar='NAME=PATTERN,...',
        help="a row of the table, such as heads='rpn_head,roi_head'; again for more. two-stage stands for "
        'backbone with neck, proposals and RoI heads. Else rows go by first names')
    parser.add_argument('--dry-run', action='store_true', help='say what would be written; write nothing')
    return parser.parse_args()


def lossy_from(args: argparse.Namespace) -> Lossy:
    """What --int8 and --codebook ask for."""
    if args.codebook is None:
        return Lossy(int8=args.int8)
    try:
        bits = int(args.codebook[0])
    except ValueError:
        raise UsageError(f"--codebook begins with a number of bits, not with '{args.codebook[0]}'") from None
    return Lossy(int8=args.int8, codebook=bits, codebook_keys=args.codebook[1:])


def groups_from(given: Optional[List[str]]) -> Dict[str, List[str]]:
    """What --group asks for."""
    groups: Dict[str, List[str]] = {}
    for one in given or []:
        name, equals, patterns = one.partition('=')
        if one == 'two-stage':
            groups.update(TWO_STAGE)
        elif not equals or not name or not patterns:
            raise UsageError(f"--group needs NAME=PATTERN,... or two-stage; got '{one}'")
        else:
            groups[name] = patterns.split(',')
    return groups


def main() -> None:
    args = parse_args()
    cli.prepare()
    require_suffix(args.out)
    lossy, groups = lossy_from(args), groups_from(args.group)
    checkpoint = cli.require_checkpoint(args.checkpoint)
    if Path(args.out).exists() and Path(args.checkpoint).exists() and Path(args.out).samefile(
            args.checkpoint):
        raise UsageError(f"--out would overwrite '{args.checkpoint}'")
    if not args.dry_run:
        cli.require_writable(args.out)
    # Before the work: a pattern may match nothing.
    block_sizes(checkpoint['state_dict'], groups=groups)
    compressed = compress(checkpoint, lossy)
    if not args.dry_run:
        write_compressed(compressed, args.out)
    sizes = block_sizes(checkpoint['state_dict'], compressed.entries, groups)
    if args.report:
        print(*table(sizes, len(compressed.content)), sep='\n')
    counts: Dict[str, int] = {}
    for entry in compressed.entries:
        counts[entry.row['encoding']] = counts.get(entry.row['encoding'], 0) + 1
    print('entries: ' + ', '.join(f'{count} {name}' for name, count in sorted(counts.items())))
    if compressed.dropped:
        print('left out: ' + ', '.join(compressed.dropped))
    dense = 4e-6 * sum(size.parameters for size in sizes)
    size = len(compressed.content)
    print(
        f'{"would write" if args.dry_run else "written to"} {args.out}: {size} bytes ({size / 1e6:.2f} MB), '
        f'{size / 1e6 / dense:.1%} of {dense:.2f} MB in float32')


if __name__ == '__main__':
    cli.run(main)

"""All parts of a table, one after the other, in this process."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .passes import Passes
from .table import ResultTable


def detect_all(
    passes: Passes, table: ResultTable, tell: Callable[[int], object], decoders: int = 2
) -> None:
    """Make all parts of a table that are missing.

    Args:
        passes (Passes): The detector.
        table (ResultTable): Entered.
        tell (Callable): Told of each part how many pictures it has.
        decoders (int): Threads that read and decode ahead. Defaults to 2.
    """
    missing = table.missing()
    coming = (picture for number in missing for picture in table.part(number))
    ahead: deque = deque()
    with ThreadPoolExecutor(decoders) as pool:

        def prepare(_) -> tuple:
            # Asked for in this order.
            while len(ahead) < 2 * decoders + 1 and (picture := next(coming, None)) is not None:
                ahead.append(pool.submit(passes.prepare, picture))
            return ahead.popleft().result()

        for number in missing:
            rows = passes.rows_of(table.part(number), prepare=prepare)
            table.write(number, rows)
            tell(len(rows))

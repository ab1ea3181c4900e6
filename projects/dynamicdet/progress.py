"""Progress with an ETA, on a terminal and in a log."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

#: Wraps what is iterated over; the text says what is done. `progress` is one.
Progress = Callable[[Iterable, str], Iterable]
#: Is told how many are done, and how many there are. `counter` gives one.
CountProgress = Callable[[int, int], None]


def silence() -> contextlib.AbstractContextManager:
    """For pycocotools, which prints as it reads."""
    return contextlib.redirect_stdout(io.StringIO())


def progress(steps: Iterable, what: str) -> tqdm:
    """A progress bar with an ETA; where the output is no terminal, one every ten seconds, and a
    line's end behind it."""
    if sys.stderr.isatty():
        return tqdm(steps, desc=what, mininterval=0.5, leave=False)
    return tqdm(steps, desc=what, mininterval=10, delay=10)


def counter(what: str) -> Callable[[int, int], None]:
    """The same for those who count: call it with how many are done and how many there are."""
    bar = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or progress(range(total), what)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            bar = None

    return update


def picture_bar(total: int, done: int) -> tqdm:
    """A bar of pictures with their rate and an ETA, for a run of which some are done; call its
    ``update`` with how many more are."""
    often = 0.5 if sys.stderr.isatty() else 10
    return tqdm(total=total, initial=done, desc='pictures', unit=' pictures', mininterval=often)

"""One bar at a time for what takes more than two seconds, without a parameter in every function on the way.

Who is asked says whether bars are shown; who works says what a stage is and how far it is. A stage within a stage
counts nothing: the outer one does. What cannot be counted has a line instead. Nothing is shown by default.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Thread, Timer

from tqdm.auto import tqdm

SECONDS = 2.0  # what is done sooner shows no bar
TICK = 1.0  # seconds after which the clock of a bar that stands is shown again
_SHOWN: ContextVar[bool] = ContextVar("shown", default=False)
_BAR: ContextVar[tqdm | None] = ContextVar("bar", default=None)


@contextmanager
def shown(show: bool) -> Iterator[None]:
    """Within this, stages show a bar or do not."""
    before = _SHOWN.set(show)
    try:
        yield
    finally:
        _SHOWN.reset(before)


@contextmanager
def if_slow(show: bool, tell: Callable[[], object]) -> Iterator[None]:
    """Tell once, from another thread, if what is within this takes long, and nothing afterwards."""
    if not show:
        yield
        return
    clock = Timer(SECONDS, tell)
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        clock.cancel()
        clock.join()


@contextmanager
def ticking(bar: tqdm) -> Iterator[None]:
    """Within this, a bar on a terminal shows its clock while nothing moves it: what is slow isn't silent."""
    if bar.disable or not sys.stderr.isatty():  # a file would only grow by it
        yield
        return
    over = Event()

    def tick() -> None:
        wait = SECONDS
        while not over.wait(wait):
            bar.refresh()
            wait = TICK

    clock = Thread(target=tick, daemon=True)
    clock.start()
    try:
        yield
    finally:
        over.set()
        clock.join()


@contextmanager
def stage(what: str, total: int, unit: str = "text") -> Iterator[None]:
    """A part of the work with a bar of its own, which `advance` moves: rate and time left."""
    if _BAR.get() is not None:
        yield
        return
    # The mean rate, smoothing 0: the first look comes when the time is up, not when something is done.
    with tqdm(total=total, desc=what, unit=unit, disable=not _SHOWN.get(), delay=SECONDS, smoothing=0) as bar:
        before = _BAR.set(bar)
        try:
            with if_slow(_SHOWN.get(), lambda: bar.update(0)), ticking(bar):
                yield
        finally:
            _BAR.reset(before)


def expect(count: int) -> None:
    """So many more are to be done than was thought."""
    bar = _BAR.get()
    if bar is not None:
        bar.total += count


def advance(count: int) -> None:
    """So many more are done; the bar grows where there are more than was thought."""
    bar = _BAR.get()
    if bar is not None:
        bar.total = max(bar.total, bar.n + count)
        bar.update(count)


@contextmanager
def announced(what: str) -> Iterator[None]:
    """A part of the work that cannot be counted: one line on stderr says what it is, if it takes long."""
    with if_slow(_SHOWN.get() and _BAR.get() is None, lambda: sys.stderr.write(f"{what} ...\n")):
        yield

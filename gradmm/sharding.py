"""One synthesis by several processes: who does which unit of work, and how they wait for one another.

Knows neither texts nor gradients. A launcher (`accelerate launch`, `torchrun`) starts one program several times and
tells each by RANK, WORLD_SIZE and LOCAL_RANK which one it is. Units of work follow from settings alone, each process
does every WORLD_SIZE-th, and results travel through the output folder, which all must see; the store at MASTER_ADDR
carries no more than who has come where, who is alive and who has failed. So no result depends on how many processes
there are, no process waits for one that is gone, and unfinished work is continued by any number of processes.

The rendezvous and its store are torch.distributed's; its process groups, and with them accelerate's PartialState, are
not used: a process that hangs looks there like one that is slow until a timeout that must be longer than any unit of
work, one that is between two barriers does not learn of another's failure, and none learns its reason.
"""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed

from gradmm.errors import UserError, first_line, require

POLL = 0.05
BEAT = 2.0  # seconds between two signs of life
SILENCE = 120.0  # without one for so long, a process counts as gone
ARRIVAL = 1800.0  # what a process may take to come here at all: models are loaded before
VISIBLE = 120.0  # what a shared folder may take to show another machine's file
T = TypeVar("T")


def launched() -> tuple[int, int, int]:
    """A launcher's word: this process's number, how many there are, its number on this machine; without one (0, 1, 0).

    Raises:
        UserError: the launcher's variables are no such numbers.
    """
    values = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(values):
        return 0, 1, 0
    values.append(os.environ.get("LOCAL_RANK") or values[0])
    require(
        all(value.isdecimal() for value in values) and int(values[0]) < int(values[1]),
        f"RANK, WORLD_SIZE, LOCAL_RANK = {', '.join(values)} do not say which of how many processes this is: unset "
        "them, or start with accelerate launch or torchrun",
    )
    rank, count, local = map(int, values)
    return rank, count, local


class _Alone:
    """What one process leaves word in: torch's own stores are not in every build of it, nor on every system."""

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}

    def set(self, name: str, word: str) -> None:
        self._held[name] = word.encode()

    def get(self, name: str) -> bytes:
        return self._held[name]

    def check(self, names: Sequence[str]) -> bool:
        return all(name in self._held for name in names)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that do one synthesis; by default one alone, which never waits.

    Attributes:
        rank: this process's number.
        count: how many there are.
        store: where they leave word for one another: a `torch.distributed.Store`, or what stands in for it.
    """

    rank: int = 0
    count: int = 1
    store: Any = field(default_factory=_Alone)

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, place: str, units: Sequence[int], work: Callable[[int], T], read: Callable[[int], T]) -> list[T]:
        """Every unit's result, in order.

        Args:
            place: a name that is met once.
            work: computes a unit and leaves it in the output folder; called for this process's own.
            read: reads a unit that another process left there; called when all are done.
        """
        own = {}
        for unit in units[self.rank :: self.count]:
            self.check()
            own[unit] = work(unit)
        self.meet(f"{place}, done")
        found = [own[unit] if unit in own else read(unit) for unit in units]
        self.meet(f"{place}, read")  # until here nobody clears anything away
        return found

    def main_first(self, place: str, call: Callable[[], T]) -> T:
        """The call's result: the leading process calls first, the others when it has."""
        if self.leads:
            result = call()
            self.meet(place)
            return result
        self.meet(place)
        return call()

    def meet(self, place: str) -> None:
        """Wait until every process has come to this place; raise if one has failed or gives no sign of life."""
        self._tell(f"{place}/{self.rank}")
        self._await(place, range(self.count))

    def check(self) -> None:
        """Raise UserError if another process has failed."""
        with self._reached():
            failed = self.store.get("failed").decode() if self.store.check(["failed"]) else ""
        require(not failed, f"{failed}: what was finished is kept in the output folder, mend it and start again")

    def find(self, path: Path | None) -> None:
        """Wait until a file that another process has written can be seen.

        Raises:
            UserError: it does not appear.
        """
        deadline = time.monotonic() + VISIBLE
        while path is not None and not path.exists():
            self.check()
            require(
                time.monotonic() < deadline,
                f"{path} was written by another process and cannot be seen by process {self.rank} of {self.count} "
                f"after {VISIBLE:.0f} seconds: give an output folder that all of them share",
            )
            time.sleep(POLL)

    def _tell(self, name: str, word: str = "") -> None:
        with self._reached():
            self.store.set(name, word)

    def _await(self, place: str, ranks: Sequence[int]) -> None:
        """Until these have come; a sign of life is whatever is new in `alive/<rank>`."""
        for rank in ranks:
            last, since = None, 0.0
            while True:
                self.check()
                with self._reached():
                    if self.store.check([f"{place}/{rank}"]):
                        break
                    sign = self.store.get(f"alive/{rank}") if self.store.check([f"alive/{rank}"]) else b""
                if sign != last:
                    last, since = sign, time.monotonic()
                limit = SILENCE if sign else ARRIVAL
                require(
                    time.monotonic() - since < limit,
                    f"process {rank} of {self.count} gave no sign of life for {limit:.0f} seconds: what was finished "
                    "is kept in the output folder, see to that process and start again",
                )
                time.sleep(POLL)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the store's own errors are RuntimeErrors
            raise UserError(
                f"process {self.rank} of {self.count} has lost the others at {os.environ.get('MASTER_ADDR')} "
                f"({first_line(error)}): what was finished is kept in the output folder, start again"
            ) from error

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Show signs of life; tell the others of a failure; the leader, who may hold the store, leaves last.

        Raises:
            BaseException: what is raised within, once the others have been told.
        """
        over = threading.Event()
        pulse = threading.Thread(target=self._beat, args=(over,), daemon=True)
        pulse.start()
        try:
            yield
            if self.leads:
                self._await("left", range(1, self.count))
        except BaseException as error:
            with suppress(RuntimeError):  # the store may be what has failed
                if not self.store.check(["failed"]):
                    self.store.set("failed", f"process {self.rank} of {self.count} ended ({first_line(error)})")
            raise
        finally:
            over.set()
            pulse.join()
        if not self.leads:
            self._tell(f"left/{self.rank}")

    def _beat(self, over: threading.Event) -> None:
        number = 0
        while True:
            try:
                self.store.set(f"alive/{self.rank}", str(number))
            except RuntimeError:  # the store is gone, which the main thread will notice
                return
            number += 1
            if over.wait(BEAT):
                return


@functools.cache
def _base(address: str, port: str, rank: int, count: int):
    """The store of all visits: whoever comes early to the next one must not meet a server that is about to go."""
    return next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=ARRIVAL)))[0]


@contextmanager
def processes(output: str | Path | None) -> Iterator[ProcessGroup]:
    """The processes of this synthesis, as the launcher started them; an error within ends them all.

    Every process must come here equally often and in the same order.

    Raises:
        UserError: several processes without an output folder or a place to meet, or they do not find one another.
    """
    rank, count, _ = launched()
    if count == 1:
        yield ProcessGroup()
        return
    require(
        output is not None,
        f"{count} processes were launched and share one synthesis through its folder: give output, a folder that all "
        "of them see",
    )
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    require(
        address != "" and port.isdecimal() and 0 < int(port) < 1 << 16,
        f"MASTER_ADDR, MASTER_PORT = {address!r}, {port!r} do not say where the {count} processes meet: unset RANK and "
        "WORLD_SIZE, or start with accelerate launch or torchrun",
    )
    meeting = ProcessGroup(rank, count)
    with meeting._reached():
        base = _base(address, port, rank, count)
        visit = base.add(f"gradmm/visits/{rank}", 1)
    here = ProcessGroup(rank, count, torch.distributed.PrefixStore(f"gradmm/{visit}", base))
    with here.at_work():
        yield here

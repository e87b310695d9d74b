"""How fast this machine is, how long each phase takes, and the share of its floor that it reaches.

Knows no phase's arithmetic (`gradmm.experiments.roofline` counts it) and no algorithm: it times the functions that the
pipeline calls. Times are wall seconds; on a GPU every clock waits for the work that it has seen begin.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gradmm import admm, searches
from gradmm.config import SynthesisConfig
from gradmm.data import Example
from gradmm.device import fast_products
from gradmm.errors import require
from gradmm.experiments.records import short_commit
from gradmm.experiments.roofline import Cost
from gradmm.models import DTYPES, Model
from gradmm.privacy import release
from gradmm.selection import Selector
from gradmm.synthesis import SynthesisResult, synthesize
from gradmm.tasks import Task

SHORTEST = 0.02  # seconds of a timing: shorter work is repeated within it
BANDWIDTH_BYTES = 1 << 28  # of each vector: far more than a processor's caches hold
# Where the pipeline spends a phase's time, as (room, function): none of them is called within another.
CLOCKED = {
    "initialisation": (searches, "_initial"),
    "inner steps": (admm.InnerLoop, "minimise"),
    "projection": (searches, "project"),
    "filter": (Selector, "rows"),
}
PHASES = ("target", *CLOCKED)


def wait(device: torch.device | str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device | str) -> float:
    """Wall seconds of one call and of the work that it gave the device."""
    wait(device)
    begun = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begun


# ---------------------------------------------------------------- the machine


@dataclass(frozen=True)
class Rates:
    """What a machine reaches on plain work of one type.

    Attributes:
        matmul: operations a second: the highest over `products`.
        bandwidth: bytes a second to and from memory: the higher of copy and triad.
        products: for each (rows, inputs, outputs), the median operations a second.
        streams: bytes a second of "copy" (b = a) and "triad" (c = a + 3 b).
        device, dtype, threads: on what.
    """

    matmul: float
    bandwidth: float
    products: dict[tuple[int, int, int], float]
    streams: dict[str, float]
    device: str
    dtype: str
    threads: int


def measure_rates(
    device: torch.device | str,
    dtype: str,
    products: Sequence[tuple[int, int, int]],
    repeats: int = 5,
    stream_bytes: int = BANDWIDTH_BYTES,
) -> Rates:
    """Measure a machine with the threads that torch has now.

    Args:
        dtype: a name in `models.DTYPES`.
        products: (rows, inputs, outputs) of the products, such as `roofline.products` gives.
        repeats: timings of which the median counts.
        stream_bytes: of each vector that is copied; it should be far above the caches.

    Raises:
        UserError: an unknown type, no products, or fewer than one repeat.
    """
    require(dtype in DTYPES, f"the dtype {dtype!r} is not usable: use one of {', '.join(DTYPES)}")
    few = f"{len(products)} products, {repeats} repeats: give at least one of each"
    require(len(products) > 0 and repeats >= 1, few)
    reached = {size: _product_rate(size, device, DTYPES[dtype], repeats) for size in dict.fromkeys(products)}
    streams, threads = _stream_rates(device, repeats, stream_bytes), torch.get_num_threads()
    return Rates(max(reached.values()), max(streams.values()), reached, streams, str(device), dtype, threads)


@torch.no_grad()
def _product_rate(size: tuple[int, int, int], device, dtype: torch.dtype, repeats: int) -> float:
    rows, inputs, outputs = size
    x, weight = (torch.randn(count, inputs, device=device).to(dtype) for count in (rows, outputs))
    with fast_products(torch.device(device)):  # as the solver and the models multiply
        seconds = _median_seconds(lambda: torch.nn.functional.linear(x, weight), device, repeats)
    return 2 * rows * inputs * outputs / seconds


@torch.no_grad()
def _stream_rates(device, repeats: int, size: int) -> dict[str, float]:
    a, b, c = (torch.ones(size // 4, device=device) for _ in range(3))
    copied = _median_seconds(lambda: b.copy_(a), device, repeats)
    added = _median_seconds(lambda: torch.add(a, b, alpha=3.0, out=c), device, repeats)
    return {"copy": 2 * size / copied, "triad": 3 * size / added}


def _median_seconds(call: Callable[[], object], device, repeats: int) -> float:
    """Of one call, after a first that warms up; short calls are timed many at once."""
    call()
    once = seconds_of(call, device)
    times = max(1, round(SHORTEST / max(once, 1e-9)))
    return statistics.median(seconds_of(lambda: [call() for _ in range(times)], device) / times for _ in range(repeats))


# ---------------------------------------------------------------- the phases


@contextmanager
def clocks(device: torch.device | str) -> Iterator[dict[str, float]]:
    """Within this, the seconds of every phase in CLOCKED add up in the dictionary that it gives."""
    spent = dict.fromkeys(CLOCKED, 0.0)
    with ExitStack() as replaced:
        for phase, (room, name) in CLOCKED.items():
            function = getattr(room, name)
            replaced.callback(setattr, room, name, function)
            setattr(room, name, _clocked(function, phase, spent, device))
        yield spent


def _clocked(function: Callable, phase: str, spent: dict[str, float], device) -> Callable:
    def timed(*given, **named):
        wait(device)
        begun = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            wait(device)
            spent[phase] += time.perf_counter() - begun

    return timed


def time_synthesis(
    model: Model, task: Task, examples: Sequence[Example], config: SynthesisConfig
) -> tuple[SynthesisResult, dict[str, float]]:
    """Release and synthesize in this process, in memory.

    Returns:
        The result, and the seconds of PHASES, of "other" (plans, bookkeeping) and of the "whole".
    """
    begun = time.perf_counter()
    made = release(model, task, examples, space=config.space, progress=False)
    wait(model.device)
    target = time.perf_counter() - begun
    with clocks(model.device) as spent:
        result = synthesize(model, task, made, config, progress=False)
        wait(model.device)
    whole = time.perf_counter() - begun
    return result, {"target": target, **spent, "other": whole - target - sum(spent.values()), "whole": whole}


# ---------------------------------------------------------------- both together


def floor_seconds(work: Cost, rates: Rates) -> float:
    """What the machine needs for the operations or for the bytes, whichever takes longer."""
    return max(work.operations / rates.matmul, work.bytes / rates.bandwidth)


def shares(works: Mapping[str, Cost], seconds: Mapping[str, float], rates: Rates) -> list[dict]:
    """For each phase: its operations, bytes, floor and what sets it, measured seconds, and floor / measured."""
    rows: list[dict[str, Any]] = []
    for phase, work in works.items():
        floor = floor_seconds(work, rates)
        bound = "arithmetic" if floor == work.operations / rates.matmul else "memory"
        row = {"phase": phase, "operations": work.operations, "bytes": work.bytes, "bound by": bound}
        rows.append(row | {"floor_seconds": floor, "seconds": seconds[phase], "share": floor / seconds[phase]})
    return rows


def ran_on(record: Mapping) -> str:
    """The processor with its threads, or the GPU, that a benchmark's record comes from."""
    machine, on_cpu = record["machine"], record["settings"]["device"] == "cpu"
    return f"{machine['processor']}, {machine['threads']} thread(s)" if on_cpu else machine["gpu"]


def summary(record: Mapping) -> dict:
    """A row of a table for a record of `tests/benchmarks/whole_synthesis.py`."""
    said, found = record["settings"], record["results"]
    whole, share = found["phases"]["whole"], {row["phase"]: row["share"] for row in found["floors"]}
    ratio = whole["ratio"]
    return {
        "shape": said["shape"],
        "type": said["dtype"],
        "on": ran_on(record),
        "groups": found["groups"],
        "steps": f"{said['outer_steps']} x {said['inner_steps']}",
        "seconds": whole["fast_seconds"]["median"],
        "against the literal method": f"{ratio['median']:.1f}x ({ratio['low']:.1f} to {ratio['high']:.1f})",
        "floor, inner steps": f"{share['inner steps']:.0%}",
        "floor, projection": f"{share['projection']:.0%}",
        "peak, GB": found["memory"]["peak"] / 1e9,
        "weights, GB": found["memory"]["weights"] / 1e9,
        "torch": record["versions"]["torch"],
        "commit": short_commit(record),
    }


def of_card(record: Mapping) -> list[dict]:
    """Rows of a table for a record of `tests/benchmarks/gpu.py`; figures without a column of their own are "more"."""
    where = {"on": ran_on(record), "type": record["settings"]["dtype"]}
    columns = ("milliseconds", "seconds", "a second", "share of the rate", "peak, GB")
    rows = []
    for found in record["results"]["rows"]:
        more = {name: value for name, value in found.items() if name not in ("shape", "part", *columns)}
        said = (
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in more.items()
        )
        figures = {name: found.get(name) for name in columns}
        rows.append({**where, "shape": found["shape"], "part": found["part"], **figures, "more": ", ".join(said)})
    return rows

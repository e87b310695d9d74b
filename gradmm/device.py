"""What a GPU does better than a processor: steps replayed without the host, work as large as its memory, fast products.

Knows no language model but its layers. On a CPU each function here is the plain thing: the step as it is, the whole
work at once. So the code that runs on a card is the code that the tests run.
"""

import gc
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar, cast

import torch

from gradmm.errors import UserError, first_line

LOG = logging.getLogger(__name__)
T = TypeVar("T")
WARM_UP = 2  # runs before a capture: libraries choose their kernels and take their memory
# Inner steps from which compiled layers pay. On an H100 the compiler took 2.7 s for a layer of phi-1.5, whose code all
# layers share, and saved 7 ms of a captured step of 44 ms: 390 steps earn it.
COMPILED_FROM = 500
SHARE = 0.8  # of the free memory that a pass may take
SPARE: list[Callable[[], object]] = []  # each gives up what a room keeps only to be faster
UNCAPTURED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # language models whose reading can't be captured


class Graphs:
    """Steps captured as CUDA graphs, all in one pool of memory: what one replay leaves there, the next may overwrite.

    A captured step reads and writes tensors that stay where they are, and asks for no number on the host. A step that
    can't be captured (its model waits for the device) runs as it is, and the log says so.
    """

    def __init__(
        self,
        device: torch.device,
        within: Callable[[], AbstractContextManager] = nullcontext,
        lm: torch.nn.Module | None = None,
    ) -> None:
        """
        Args:
            device: on any other than CUDA nothing is captured.
            within: what surrounds a capture, such as `compiled_layers`; where it fails, the capture does without.
            lm: whose step it is: what can't be captured is not tried again by other graphs of the same model.
        """
        self.device, self.within = device, within
        self._lm = None if lm is None else weakref.ref(lm)
        self._replays: dict[object, Callable[[], object]] = {}
        self.captures = device.type == "cuda" and lm not in UNCAPTURED
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None
        # One of this device for all: torch's own is of the device that captured first, and records nothing of another.
        self._stream = torch.cuda.Stream(device) if self.captures else None

    def of(self, key: object, step: Callable[[], None], begin: Callable[[], None]) -> Callable[[], object]:
        """A step to be called as often as it takes; `begin` has been run last.

        Args:
            key: names the step and all that is not in its tensors: two of the same key are the same.
            begin: puts the step's tensors at the beginning; capturing runs the step a few times.
        """
        if self.captures and key not in self._replays:
            self._replays[key] = self._captured(step)
            begin()
        return self._replays.get(key, step)

    def _captured(self, step: Callable[[], None]) -> Callable[[], object]:
        try:
            with self.within():
                return self.capture(step)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler and the capture raise many kinds; each means: do without
            if self.within is not nullcontext:
                LOG.warning("the layers can't be compiled and are captured as they are (%s)", first_line(error))
                self.within = nullcontext
                return self._captured(step)
            LOG.warning("a step can't be captured as a CUDA graph and runs as it is (%s)", first_line(error))
            self.captures = False  # nor would the next one
            if lm := self._lm and self._lm():
                UNCAPTURED.add(lm)
            return step

    def capture(self, step: Callable[[], None]) -> Callable[[], object]:
        """Run a step `WARM_UP` times and then capture it: what is given out repeats all that it launched."""
        aside, main = cast(torch.cuda.Stream, self._stream), torch.cuda.current_stream(self.device)
        aside.wait_stream(main)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                step()
        main.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Within `main`, which is there again if the capture fails.
        with torch.cuda.stream(main), torch.cuda.graph(graph, pool=self._pool, stream=aside):
            step()
        return graph.replay


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's whole memory, whatever is free of it, so that batches follow from the card; 0 of a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def free_to_ask(tensor: torch.Tensor) -> bool:
    """Whether asking for a tensor's numbers makes nobody wait: on a CPU."""
    return tensor.device.type == "cpu"


def body_of(lm) -> torch.nn.Module:
    """A language model without its head; some families name it otherwise than they say, and give the whole instead."""
    return lm.base_model if lm.base_model is not lm else getattr(lm, "model", lm)


def text_body(lm) -> torch.nn.Module:
    """The part of a model of transformers that reads text: its body, or of one that reads images too its decoder."""
    return body_of(lm) if lm.config.get_text_config() is lm.config else lm.get_decoder()


def layers_of(lm) -> list[torch.nn.Module]:
    """A model's layers, first to last; none where its family keeps them in no list."""
    stacks = [part for part in text_body(lm).modules() if isinstance(part, torch.nn.ModuleList) and len(part)]
    return list(stacks[0]) if stacks else []


@contextmanager
def compiled_layers(lm: torch.nn.Module) -> Iterator[None]:
    """Within this the layers of a model run as the compiler has them: equal layers share one code.

    The last layer stays as it is, since `Model.last_hidden` cuts its work short.
    """
    layers = layers_of(lm)[:-1]
    for layer in layers:
        layer.compile(dynamic=False)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None  # what Module.compile sets; there is no method that takes it back


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Within this a GPU multiplies float32 matrices in TF32: not the norms and sums of a release, its guarantee."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    try:
        before = matmul.allow_tf32
    except RuntimeError:  # set by torch's newer switch, beside which this one is refused: left as it was chosen
        yield
        return
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def most_at_once(trial: Callable[[int], object], most: int, device: torch.device) -> int:
    """How many of `most` equal things a device's memory holds in one pass; on a CPU all of them.

    What one takes in a trial pass, and what memory is free, say with how many to try; half as many each time that it
    does not hold.

    Args:
        trial: a pass with so many of them.

    Raises:
        UserError: one is too much.
    """
    if device.type != "cuda":
        return most
    halving(trial, 1, "groups")  # what libraries take for themselves
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    halving(trial, 1, "groups")
    one = max(1, torch.cuda.max_memory_allocated(device) - held)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
    passes = -(-most // max(1, min(most, int(SHARE * free) // one)))
    size = -(-most // passes)  # passes of equal size

    def tried(size: int) -> int:
        trial(size)
        return size

    return halving(tried, size, "groups")


def halving(work: Callable[[int], T], size: int, what: str) -> T:
    """`work(size)`; where the device's memory does not hold it, with half of that, down to 1.

    Args:
        what: is counted, for messages.

    Raises:
        UserError: 1 is too much.
    """
    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError as error:
            _require_smaller(size, what, error)
        LOG.info("the device's memory does not hold %d %s: half of that is tried", size, what)
        size = (size + 1) // 2
        forget()


def in_batches(work: Callable[[list[int]], object], batches: Iterable[list[int]]) -> None:
    """`work(rows)` for each batch of rows; one that the device's memory does not hold is cut in halves.

    Args:
        work: gives the same for a row whatever is beside it, and changes nothing where it fails.

    Raises:
        UserError: one row is too much.
    """
    waiting = list(batches)[::-1]
    while waiting:
        rows = waiting.pop()
        try:
            work(rows)
            continue
        except torch.OutOfMemoryError as error:
            _require_smaller(len(rows), "texts", error)
        forget()
        half = len(rows) // 2
        waiting += [rows[half:], rows[:half]]


def _require_smaller(size: int, what: str, error: torch.OutOfMemoryError) -> None:
    if size == 1:
        mend = "take a smaller model, shorter texts or dtype = 'bfloat16'"
        with enough_memory(f"1 of the {what}", f"{mend}; in fine-tuning layers = 4 or adapter = 'lora'"):
            raise error


@contextmanager
def enough_memory(what: str, mend: str) -> Iterator[None]:
    """Within this what the device's memory does not hold is an error that says what to do.

    Raises:
        UserError: it does not hold it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device's memory does not hold {what} ({first_line(error)}): {mend}") from error


def forget() -> None:
    """Give back the memory of what failed, and of what is kept only to be faster."""
    for give_up in SPARE:
        give_up()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

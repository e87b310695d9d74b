"""What a GPU does: steps that can be replayed, passes as large as the memory, compiled layers; checked without one."""

import functools
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradmm import admm, device
from gradmm.errors import UserError
from gradmm.matching import Matching
from gradmm.privacy import release
from gradmm.tasks import Task, tokenize_task

CPU = torch.device("cpu")
# What makes a host wait for a GPU, or copies from it to the GPU: neither can be captured.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "lift_fresh", "masked_select", "unique_dim"}
TASK = Task("toy", ("bad", "good"), (" bad", " great"), "{text} it was", ("the movie was:", "a:"))
REAL = [{"text": text, "label": label} for label, text in enumerate(("a dull plot", "a fine film"))]


class Launches(TorchDispatchMode):
    """Every operation with its shapes and plain arguments, and how many of them make a host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        self.waits += [name] * (name in WAITS)
        self.seen.append((name, *map(_plain, args), *map(_plain, (kwargs or {}).values())))
        return function(*args, **(kwargs or {}))


def _plain(value):
    """A tensor's shape, and what a captured step would hold for ever: plain numbers."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


@contextmanager
def as_on_a_gpu():
    """Neither gradmm nor transformers looks at a mask's values, as where a step is captured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradmm.models.free_to_ask", lambda tensor: False)
        patch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
        yield


@pytest.fixture(params=["head", "label_rows"])
def matching(request, tiny_model, kind):
    model = tiny_model(kind)
    tokens = tokenize_task(TASK, model.tokenizer)
    found = release(model, TASK, REAL, space=request.param)
    return Matching(model, tokens, found.targets, found.space, end=model.ends[0])


def inner_loop(matching, classes, graphs):
    config = admm.Config(inner_steps=3, lr=0.05)
    return admm.InnerLoop(lambda x, ids, which: matching.of_vectors(x, ids, classes[which]), config, graphs)


def drawn(model, seed, groups=2):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 3, 4, model.embedding.shape[1], generator=draw, dtype=torch.float64)
    ids = torch.randint(0, 9, (groups, 3, 4), generator=draw)
    return x, ids


class Watched(device.Graphs):
    """Each step runs as it is, and what it launches is told by its name."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.runs = []

    def of(self, key, step, begin):
        def run():
            with Launches() as launches:
                step()
            self.runs.append((key[0], launches.seen, launches.waits))

        return run


def test_an_inner_step_waits_for_nothing_and_launches_the_same_whatever_its_numbers(matching):
    """Then a graph captured from one step is right for all."""
    classes = torch.tensor([0, 1])
    inner, runs = inner_loop(matching, classes, Watched()), []
    with as_on_a_gpu():
        for seed in range(4):
            x, ids = drawn(matching.model, seed)
            inner.graphs.runs = []
            inner.move(x, x + 0.1, 0 * x, ids, torch.arange(2))
            runs.append(inner.graphs.runs)
    assert runs[1] == runs[2] == runs[3]  # the first looks up what is constant
    # Adam's count of steps, which lies on the CPU here and on the GPU where it is captured.
    assert [waits for *_, waits in runs[1]] == [[], *[["_local_scalar_dense"]] * 3, []]


def test_the_masked_pass_of_a_gpu_equals_that_of_a_cpu(matching):
    x, ids = drawn(matching.model, 5)
    ids[0] = 1  # no text ends: a CPU leaves the mask out
    classes = torch.tensor([1, 0])
    plain = matching.of_vectors(x, ids, classes)
    with as_on_a_gpu():
        torch.testing.assert_close(matching.of_vectors(x, ids, classes), plain, rtol=1e-9, atol=1e-12)


class Replays(device.Graphs):
    """Captures as on a GPU, where the step's own functions then run no more: only what they launched is repeated."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.captures, self.captured = True, []

    def capture(self, step):
        for _ in range(device.WARM_UP + 1):
            step()
        self.captured.append(step)
        return step


def test_what_is_replayed_equals_what_runs_as_it_is(matching):
    classes = torch.tensor([0, 1, 1])
    x, ids = drawn(matching.model, 7, groups=3)
    z, lam = x + 0.2, 0.1 * x
    plain = inner_loop(matching, classes, device.Graphs(CPU))
    expected = plain.move(x, z, lam, ids, torch.arange(3))
    graphs = Replays()
    inner = admm.InnerLoop(plain.objective, plain.config, graphs)
    for _ in range(2):  # the second time with the graphs of the first
        found = inner.move(x, z, lam, ids, torch.arange(3))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(graphs.captured) == 3  # a look, a descent, a measure
    inner.move(x[1:], z[1:], lam[1:], ids[1:], torch.arange(1, 3))
    assert len(graphs.captured) == 6  # other groups have other classes
    torch.testing.assert_close(inner.move(x, z, lam, ids, torch.arange(3)), expected, rtol=0, atol=0)


def test_a_whole_solution_is_the_same_with_replays(monkeypatch):
    centres = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = admm.Config(rho=0.5, outer_steps=3, inner_steps=4, lr=0.05, groups_per_pass=2)

    def solved():
        return admm.solve(
            lambda x, ids, groups: (x - centres[groups]).square().sum((1, 2, 3)),
            lambda v, groups: (v.round(), v.round().long()[..., 0]),
            admm.start(0 * centres),
            config,
        )

    plain = solved()
    monkeypatch.setattr(admm, "Graphs", lambda *_: Replays())
    assert torch.equal(solved().value, plain.value) and torch.equal(solved().match_loss, plain.match_loss)


def test_a_step_that_can_not_be_captured_runs_as_it_is(caplog):
    class Failing(Replays):
        def capture(self, step):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    runs, begins = [], []
    run = Failing().of("step", lambda: runs.append(1), lambda: begins.append(1))
    run()
    assert runs == [1] and begins == [1]
    assert "runs as it is (RuntimeError: operation not permitted when stream is capturing)" in caplog.text


def test_where_the_compiler_fails_a_step_is_captured_without_it(caplog):
    @contextmanager
    def compiled():
        raise RuntimeError("Failed to find C compiler")
        yield

    graphs = Replays()
    graphs.within = compiled
    graphs.of("step", lambda: None, lambda: None)()
    assert len(graphs.captured) == 1 and graphs.captures
    assert "can't be compiled and are captured as they are (RuntimeError: Failed to find C compiler)" in caplog.text


def test_what_a_model_could_not_have_captured_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    tries = []

    def capture(self, step):
        tries.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(device.Graphs, "capture", capture)
    one, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for lm in (one, one, other, None, None):
        device.Graphs(torch.device("cuda"), lm=lm).of("step", lambda: None, lambda: None)()
    assert len(tries) == 4  # one model's once


def test_a_capture_that_the_memory_does_not_hold_is_no_reason_to_go_on_without():
    class Full(Replays):
        def capture(self, step):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Full().of("step", lambda: None, lambda: None)


@pytest.mark.parametrize(("most", "holds", "tried"), [(20, 20, [20]), (20, 6, [20, 10, 5]), (7, 1, [7, 4, 2, 1])])
def test_what_the_memory_does_not_hold_is_halved(most, holds, tried):
    sizes = []

    def work(size):
        sizes.append(size)
        if size > holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    assert device.halving(work, most, "groups") == tried[-1] and sizes == tried


@pytest.mark.parametrize("count", [1, 5, 16])
def test_batches_that_the_memory_does_not_hold_are_cut_in_order(count):
    done = []

    def work(rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(rows)

    device.in_batches(work, [list(range(count)), [100, 101]])
    assert done == [*range(count), 100, 101]


def test_one_that_the_memory_does_not_hold_is_refused_in_a_sentence():
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    refused = r"memory does not hold 1 of the {} \(.*2.00 GiB\): take a smaller"
    with pytest.raises(UserError, match=refused.format("groups")):
        device.halving(full, 4, "groups")
    with pytest.raises(UserError, match=refused.format("texts")):
        device.in_batches(full, [[0, 1]])


def test_gradients_of_a_class_that_the_memory_does_not_hold_are_named_with_the_mend(matching, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    texts, given = ["a film", "dull", "fine"], []
    monkeypatch.setattr("gradmm.matching.greedy_order", lambda factors, *_: given.append(factors) or [0])
    for usable, order in ((range(3), [0]), ([1, 2], [1])):
        assert matching.alone_and_together(texts, 0, 1, usable, [0.0] * 3)[1] == order
    assert given[0] is matching.factors(texts, [0] * 3) and len(given[1].delta) == 2  # no copy where all are usable
    monkeypatch.setattr("gradmm.matching.greedy_order", full)
    said = r"does not hold the gradients of all texts of a class \(.*2.00 GiB\): take space = 'label_rows' or ranking"
    with pytest.raises(UserError, match=said):
        matching.greedy(texts, 0, 2)


@pytest.mark.parametrize(("free", "held", "expected"), [(100.0, 0.0, 20), (9.0, 1.0, 7), (1.0, 0.0, 1)])
def test_as_many_at_once_as_a_trial_pass_says_in_passes_of_equal_size(monkeypatch, free, held, expected):
    """A card on which one group takes 1 GB, and which has less for two than it said."""
    giga, tried = 1 << 30, []
    for name, value in (
        ("reset_peak_memory_stats", None), ("memory_allocated", held * giga),
        ("max_memory_allocated", (held + 1) * giga), ("memory_reserved", held * giga),
        ("mem_get_info", (free * giga, 0)),
    ):  # fmt: skip
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    assert device.most_at_once(tried.append, 20, torch.device("cuda")) == expected
    assert tried == [1, 1, expected]
    assert device.most_at_once(tried.append, 20, CPU) == 20 and len(tried) == 3


@pytest.mark.parametrize("fails", [1, 2])
def test_a_card_that_does_not_hold_one_group_is_told_so_in_a_sentence(monkeypatch, fails):
    tried = []
    for name in ("reset_peak_memory_stats", "memory_allocated"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_: 0)

    def full(size):
        tried.append(size)
        if len(tried) == fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    with pytest.raises(UserError, match=r"memory does not hold 1 of the groups \(.*2.00 GiB\): take a smaller model"):
        device.most_at_once(full, 20, torch.device("cuda"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_compiled_layers_share_one_code_and_give_the_same(tiny_model, kind, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    model = tiny_model(kind)
    embeds = model.embed(torch.arange(5)[None])
    plain = model.last_hidden(embeds)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with device.compiled_layers(model.lm):
        torch.testing.assert_close(model.last_hidden(embeds), plain, rtol=1e-9, atol=1e-12)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # of two layers the last is left alone
    torch._dynamo.utils.counters.clear()
    model.last_hidden(embeds)
    assert not torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def test_fast_products_are_those_of_a_gpu_and_end():
    flag = torch.backends.cuda.matmul
    assert not flag.allow_tf32
    with device.fast_products(torch.device("cuda")):
        assert flag.allow_tf32
    with device.fast_products(CPU):
        assert not flag.allow_tf32
    assert not flag.allow_tf32

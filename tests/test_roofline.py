"""The floors count what torch's own counter counts, and never more than the code really does."""

import dataclasses

import conftest
import pytest
import torch
import transformers
from test_synthesis import SMALL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gradmm import selection
from gradmm.data import Example
from gradmm.decoding import decoder_of
from gradmm.errors import UserError
from gradmm.experiments import roofline
from gradmm.models import Model, wrap_model
from gradmm.plan import Plan
from gradmm.privacy import release
from gradmm.projection import project
from gradmm.tasks import Task

DEEP = 16  # layers: what the code does beyond the floor in the last one then weighs little
TASK = Task("toy", ("bad", "good"), (" bad", " great"), "{text} it was", ("dull it was:", "great it was:"))
REAL = [Example("a dull plot " * 4, 0), Example("a fine film " * 4, 1), Example("we like the music", 1)]


def counted(call) -> int:
    """Operations of the products of one call; attention by products too, as the counter knows no CPU kernel of it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=["gpt2", "llama", "phi"])
def deep(request) -> Model:
    config = conftest.configuration_of(request.param, request.param in conftest.TIED)
    config.num_hidden_layers = DEEP
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double()
    return wrap_model(lm, conftest.make_toy_tokenizer(), request.param)


@pytest.fixture(scope="module")
def plan(deep) -> Plan:
    config = dataclasses.replace(SMALL, oversample=1, init_candidates=4, length=40, init="normal")
    return Plan.of(deep, TASK, release(deep, TASK, REAL, space="head"), config)


def test_an_architecture_alone_has_the_same_body(tiny_model, kind):
    model = tiny_model(kind)
    found = roofline.Body.of_config(model.lm.config, torch.float64)
    assert found == roofline.Body.of(model)


def test_an_inner_step_is_a_few_percent_above_its_floor(deep, plan):
    x = torch.randn(2, 2, 40, 32, dtype=torch.float64, requires_grad=True)
    ids, classes = torch.zeros(2, 2, 40, dtype=torch.long), torch.tensor([0, 1])
    done = counted(lambda: torch.autograd.grad(plan.matching.of_vectors(x, ids, classes).sum(), x))
    work = roofline.inner_step(roofline.Body.of(deep), roofline.Workload.of(plan))
    assert work.operations <= done <= 1.06 * work.operations


@pytest.mark.slow
def test_a_projection_is_a_few_percent_above_its_floor(deep, plan):
    v, rows = torch.randn(4, 40, 32, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    with decoder_of(deep, plan.tokens.prompts, 1):  # the first time it is tried whether the model can be read so
        pass
    done = counted(lambda: project(deep, plan.tables, v, plan.tokens.prompts, rows, plan.decoding))
    work = roofline.projection(roofline.Body.of(deep), roofline.Workload.of(plan))
    assert work.operations <= done <= 1.03 * work.operations


def test_a_choice_reads_nothing_that_weighs_nothing(deep, plan, monkeypatch):
    """No labels for a filter that keeps all; perplexities for the gate, once, whatever their weight in the ranking."""
    texts, classes = ["red cat sat", "blue dog", "the movie", "a film"], [0, 0, 1, 1]
    asked = []
    for name in ("label_probabilities", "perplexities"):
        real = getattr(selection, name)
        monkeypatch.setattr(selection, name, lambda *inputs, name=name, real=real: asked.append(name) or real(*inputs))
    for filter, weight, expected in (
        ("none", 0.0, ["perplexities"]), ("label", 0.0, ["perplexities", "label_probabilities"]),
        ("none", 0.1, ["perplexities"]),
    ):  # fmt: skip
        asked.clear()
        config = dataclasses.replace(plan.config, filter=filter, perplexity_weight=weight)
        verdicts, match = dataclasses.replace(plan, config=config).selector.choose(texts, classes)
        assert asked == expected and len(verdicts) == len(match) == 4
    assert [row["kept"] for row in dataclasses.replace(plan, config=config).selector.rows(texts, classes)] == [
        one.kept for one in verdicts
    ]


def test_all_steps_are_counted_and_grow_in_proportion(deep, plan):
    body, job = roofline.Body.of(deep), roofline.Workload.of(plan)
    works = roofline.synthesis(body, job)
    assert tuple(works) == roofline.PHASES
    assert (
        works["inner steps"].operations == job.outer_steps * job.inner_steps * roofline.inner_step(body, job).operations
    )
    assert works["projection"].bytes == (job.outer_steps + 1) * roofline.projection(body, job).bytes
    twice = roofline.inner_step(body, dataclasses.replace(job, groups=2 * job.groups))
    assert twice.operations == 2 * roofline.inner_step(body, job).operations
    assert twice.bytes == roofline.inner_step(body, job).bytes  # the weights are read once for all groups


def test_the_model_of_the_paper_by_arithmetic_alone():
    config = transformers.PhiConfig(
        vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32
    )
    body = roofline.Body.of_config(config, torch.bfloat16)
    assert body.parameters == pytest.approx(1.418e9, rel=1e-3) and body.number == 2 and body.largest == (2048, 8192)
    step = roofline.inner_step(body, roofline.Workload())
    plain = (
        4 * sum(body.layers) * roofline.Workload().texts * roofline.Workload().positions
    )  # 4 operations a parameter and token
    assert step.operations == pytest.approx(plain, rel=0.05)


def test_a_model_without_layers_is_refused():
    class Bare:
        base_model, config = torch.nn.Linear(2, 2), transformers.LlamaConfig()

    with pytest.raises(UserError, match="no list of layers"):
        roofline.Body.of(Model(Bare(), None, "bare", None, ""))

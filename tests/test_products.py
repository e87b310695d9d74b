"""Products in bfloat16: without instructions for it the numbers of float64, rounded, in values, gradients and whole models; with
them no memory that grows with the shapes seen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from gradmm import products
from gradmm.products import lacks_instructions, linear

ROUNDING = 2**-8  # of a number in bfloat16: half the distance of two neighbours, with the last bit of the sum for float32


@pytest.fixture(params=[False, True], ids=["without", "with"])
def instructions(request, monkeypatch) -> bool:
    """Whether the processor claims to have instructions for bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": request.param})
    return request.param


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_float64_rounded_once(monkeypatch, at_once, leading, biased):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(products, "WIDENED_AT_ONCE", at_once)
    x, weight, bias, slope = draw(*leading, 33).requires_grad_(True), draw(41, 33), draw(41) if biased else None, draw(*leading, 41)
    value = linear(x, weight, bias)
    (gradient,) = torch.autograd.grad(value, x, slope)
    exact = x.detach().double() @ weight.double().T + (bias.double() if biased else 0)
    for found, expected in ((value, exact), (gradient, slope.double() @ weight.double())):
        assert found.dtype == torch.bfloat16 and found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=ROUNDING, atol=1e-5)


def test_a_transposed_weight_is_widened_too(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(products, "WIDENED_AT_ONCE", 100)
    x, weight = draw(5, 33), draw(33, 41)
    assert torch.equal(linear(x, weight.T), linear(x, weight.T.contiguous()))


def test_the_framework_multiplies_what_it_multiplies_fast_and_what_is_trained(instructions):
    trained = draw(4, 3).requires_grad_(True)
    linear(draw(2, 3), trained).sum().backward()
    assert trained.grad is not None
    for dtype in (torch.float32, torch.float64):
        x, weight = draw(2, 3).to(dtype).requires_grad_(True), draw(4, 3).to(dtype)
        assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
        assert not lacks_instructions(weight)
    assert lacks_instructions(draw(4, 3)) == (not instructions)
    if instructions:
        assert torch.equal(linear(draw(2, 3), draw(4, 3)), torch.nn.functional.linear(draw(2, 3), draw(4, 3)))


@pytest.mark.parametrize("name", products.INSTRUCTIONS)
def test_every_kind_of_instructions_counts(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**dict.fromkeys(products.INSTRUCTIONS, False), name: True})
    assert not lacks_instructions(draw(4, 3))


def test_a_model_s_layers_are_widened_where_the_processor_needs_it(tiny_model, kind, instructions):
    layers = {dtype: layers_of(tiny_model(kind, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)}
    plain = [layer for layer in layers[torch.bfloat16] if type(layer) in (torch.nn.Linear, Conv1D)]
    assert len(layers[torch.bfloat16]) > 2
    assert len(plain) == (len(layers[torch.bfloat16]) if instructions else 0)
    assert all(type(layer) in (torch.nn.Linear, Conv1D) for layer in layers[torch.float32])


def test_few_compiled_products_are_kept_unless_the_environment_says_how_many(tiny_model, instructions, monkeypatch):
    theirs, ours = products.COMPILED
    monkeypatch.setenv(theirs, "7")
    monkeypatch.setenv(ours, "")  # so that it is put back at the end
    monkeypatch.delenv(ours)
    tiny_model("gpt2", dtype=torch.float32)
    assert ours not in os.environ
    tiny_model("gpt2", dtype=torch.bfloat16)
    assert (os.environ[theirs], os.environ.get(ours)) == ("7", products.KEPT if instructions else None)


COMPILING = """
import torch
from gradmm import products
products.keep_few_compiled()
if products.lacks_instructions(torch.ones(1).bfloat16()):
    print(0)
else:
    def grown(rows, weight=torch.ones(512, 512).bfloat16()):
        before = resident()
        for count in rows:
            torch.nn.functional.linear(torch.ones(count, 512).bfloat16(), weight)
        return resident() - before
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    grown(range(1, 101))
    print(grown(range(101, 401)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_products_of_many_shapes_hold_no_more_memory_than_those_of_a_hundred():
    environment = {name: value for name, value in os.environ.items() if name not in products.COMPILED}
    done = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, check=True, env=environment, stdin=subprocess.DEVNULL)
    assert int(done.stdout) < 40e6  # 300 more products: 0.25 MB each and more if all were kept


def layers_of(model) -> list[torch.nn.Module]:
    return [module for module in model.lm.modules() if isinstance(module, torch.nn.Linear | Conv1D)]


def test_a_widened_model_s_gradient_is_as_exact_as_the_framework_s(tiny_model, kind, monkeypatch):
    """Of the last state in the embeddings, by the same kind of attention, against the same weights in float64."""
    capable = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
    widened, exact = (tiny_model(kind, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    exact.lm.load_state_dict({name: value.double() for name, value in widened.lm.state_dict().items()})
    widened.lm.set_attn_implementation("eager")
    expected, found = slope_of(exact), slope_of(widened)
    capable["avx512_bf16"] = True
    framework = slope_of(tiny_model(kind, dtype=torch.bfloat16))
    assert 0 < (found - expected).norm() < 1.25 * (framework - expected).norm() < 0.2 * expected.norm()


def slope_of(model) -> torch.Tensor:
    x = draw(3, 7, model.embedding.shape[1]).to(model.dtype).requires_grad_(True)
    return torch.autograd.grad(model.last_hidden(x).double().square().sum(), x)[0].double()

"""Training at one learning rate: the schedule, the order of batches and the step, with or without a LoRA adapter.

Knows nothing of where examples come from, nor of choosing among rates and steps. Letters: N examples.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup
from transformers.pytorch_utils import Conv1D

from gradmm.classification import Encoded, score
from gradmm.config import FinetuneConfig
from gradmm.device import fast_products, halving, layers_of, text_body
from gradmm.errors import UserError, require
from gradmm.models import Model, batches_by_length, fast_dtype, pad_left
from gradmm.seeds import generator
from gradmm.tasks import TaskTokens

TOKENS_PER_STEP = 512  # of a pass on a CPU


def trainable_copy(model: Model, config: FinetuneConfig | None = None) -> Model:
    """A copy of the model that learns; half precision would lose small updates, so it becomes float32.

    Args:
        config: its `adapter` and `layers` say what learns; None: every parameter.

    Raises:
        UserError: an adapter whose package is not installed, or more layers than the model has.
    """
    lm = copy.deepcopy(model.lm).eval()
    if model.dtype in (torch.float16, torch.bfloat16):
        lm = lm.float()
    config = config or FinetuneConfig()
    lm.requires_grad_(config.adapter is None and config.layers is None)
    if config.layers is not None:
        _free_last(lm, config.layers)
    if config.adapter == "lora":
        add_lora(lm, config.adapter_rank, config.seed)
    return replace(model, lm=lm)


def _free_last(lm, count: int) -> None:
    """Let the last layers learn, and what stands beside the layers and is no embedding: the norms."""
    body, layers = text_body(lm), layers_of(lm)
    require(count <= len(layers), f"layers = {count}, but the model has {len(layers)}: give fewer, or None for all")
    within = {part for layer in layers for part in layer.modules()}
    beside = [part for part in body.modules() if part not in within and not isinstance(part, torch.nn.Embedding)]
    for part in (*layers[-count:], *beside):
        for weights in part.parameters(recurse=part in within):
            weights.requires_grad_(True)


def restart(trained: Model, model: Model, config: FinetuneConfig) -> None:
    """Give a `trainable_copy` of a model the weights of step 0 again."""
    if config.adapter == "lora":
        start_lora(trained.lm, config.seed)
    else:
        trained.lm.load_state_dict(model.lm.state_dict())


def learnt_weights(trained: Model) -> dict[str, Tensor]:
    """Copies of the weights that learn, by name."""
    return {name: weights.detach().clone() for name, weights in trained.lm.named_parameters() if weights.requires_grad}


def finish(trained: Model, config: FinetuneConfig) -> None:
    """Make of a `trainable_copy` a model that learns no more."""
    if config.adapter == "lora":
        fold_lora(trained.lm)
    trained.lm.requires_grad_(False)


def adamw(model: Model, rate: float, config: FinetuneConfig) -> torch.optim.AdamW:
    """The optimizer of the weights that learn; `train_at_rate` moves its rate."""
    fused = model.device.type in ("cpu", "cuda")
    learning = [weights for weights in model.lm.parameters() if weights.requires_grad]
    groups = [{"params": learning, "initial_lr": rate}]  # the peak, which a schedule that goes on asks for
    return torch.optim.AdamW(groups, lr=rate, weight_decay=config.weight_decay, fused=fused)


def optimizer_state(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What an optimizer keeps of each weight that has learnt: `number of the weight/moment` -> tensor."""
    held = optimizer.state_dict()["state"]
    return {f"{number}/{name}": value for number, moments in held.items() for name, value in moments.items()}


def restore_optimizer(optimizer: torch.optim.AdamW, held: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_state`, for a new optimizer of the same weights."""
    moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in held.items():
        number, name = key.split("/")
        moments[int(number)][name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


def train_at_rate(
    model: Model,
    tokens: TaskTokens,
    data: Encoded,
    looks: Encoded,
    optimizer: torch.optim.AdamW,
    config: FinetuneConfig,
    start: dict | None = None,
    past: Sequence[dict] = (),
) -> Iterator[dict]:
    """Train at one peak rate, in place.

    Args:
        model: a `trainable_copy`; when a row is given out, its weights are those of the row's step.
        data: the examples to train on.
        looks: the examples to look at.
        optimizer: from `adamw`, with the peak rate.
        start: another rate's row of step 0, at which all rates have the same weights; None looks.
        past: the rows of an interrupted training at this rate, which goes on behind the last of them; model and
            optimizer are as they were then.

    Yields:
        A row of `Training.curve` at each look; the run ends early where it diverges or runs out of patience.
    """
    rate = optimizer.param_groups[0]["initial_lr"]
    begin, looked = (past[-1]["step"], True) if past else (0, False)
    order = islice(batches(len(data.sequences), config), begin, None)
    # The schedule's zeros are one step before the first and one behind the last, whose rates are above zero.
    schedule = get_linear_schedule_with_warmup(optimizer, config.warmup + 1, config.steps + 1, last_epoch=begin)
    losses: list[float] = []
    for step in range(begin, config.steps + 1):
        if (step % config.eval_every == 0 or step == config.steps) and not (looked and step == begin):
            row = (
                {**start, "learning_rate": rate}
                if step == 0 and start
                else _look(model, tokens, looks, rate, step, losses, config)
            )
            past = [*past, row]
            yield row
            losses.clear()
        if step == config.steps or _waited(past) == config.patience:
            return
        losses.append(take_step(model, tokens, data, next(order), optimizer, config))
        schedule.step()
        if not math.isfinite(losses[-1]):
            return


def _waited(rows: Sequence[dict]) -> int:
    """The looks since the first of the best."""
    accuracies = [row["validation_accuracy"] for row in rows]
    return len(accuracies) - 1 - accuracies.index(max(accuracies))


def _look(
    model: Model, tokens: TaskTokens, looks: Encoded, rate: float, step: int, losses: list[float], config
) -> dict:
    with _precision(model, config):
        size = config.tokens_per_batch or model.tokens_at_once(TOKENS_PER_STEP)
        found = score(model, tokens, looks, size)
    return {
        "learning_rate": rate,
        "step": step,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "validation_loss": found.loss,
        "validation_accuracy": found.accuracy,
    }


def batches(count: int, config: FinetuneConfig):
    """Batches of row numbers without end: every row once in each pass, passes joined so that no batch is smaller."""
    size, turn = min(config.batch_size, count), 0
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator(config.seed, "fine-tuning order", turn)).tolist()
            turn += 1
        yield waiting[:size]
        waiting = waiting[size:]


def take_step(
    model: Model, tokens: TaskTokens, data: Encoded, rows: list[int], optimizer, config: FinetuneConfig
) -> float:
    """One AdamW step on the mean loss of a batch; returns that loss before the step."""
    asked = config.tokens_per_batch or model.tokens_at_once(TOKENS_PER_STEP, backward=True)
    whole = len(rows) * max(len(data.sequences[row]) for row in rows)  # more tokens than these make no other pieces
    group = optimizer.param_groups[0]

    def added(size: int) -> list[Tensor]:
        losses = _add_gradients(model, tokens, data, rows, optimizer, config, size)
        if size < min(asked, whole):
            group["held"] = size  # by the memory, at later steps too
        return losses

    with fast_products(model.device):
        losses = halving(added, min(asked, whole, group.get("held", asked)), "tokens")
        torch.nn.utils.clip_grad_norm_(model.lm.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()  # their memory is free for a look
        torch.clear_autocast_cache()  # a caller's autocast would go on with the weights before the step
    return sum(torch.stack(losses).tolist())


def _add_gradients(
    model: Model, tokens: TaskTokens, data: Encoded, rows: list[int], optimizer, config: FinetuneConfig, size: int
) -> list[Tensor]:
    """The gradient of a batch's mean loss in pieces of at most `size` tokens; returns their parts of the loss."""
    optimizer.zero_grad()
    sequences, losses = [data.sequences[row] for row in rows], []
    for piece in batches_by_length(sequences, size):
        ids, mask = pad_left([sequences[place] for place in piece], model.device)
        with _precision(model, config):
            hidden = model.last_hidden(model.embed(ids), mask)
        labels = data.labels[[rows[place] for place in piece]]
        loss = cross_entropy(model.logits_of(hidden, tokens.labels), labels, reduction="sum") / len(rows)
        loss.backward()
        losses.append(loss.detach())
    return losses


def _precision(model: Model, config: FinetuneConfig):
    wanted = model.device.type == "cuda" and fast_dtype(model.device) == torch.bfloat16
    enabled = (wanted if config.autocast is None else config.autocast) and model.dtype == torch.float32
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


# ---------------------------------------------------------------- LoRA through peft

SCALE = 2  # peft's lora_alpha over r
MAMBAS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")  # whose kernels read these weights past a layer


def add_lora(lm, rank: int, seed: int) -> None:
    """Put a pair of matrices A (r, inputs) and B (outputs, r) beside every linear layer but the head; only these learn.

    In `MAMBAS` the maps out of a state have none: their kernels read the weights themselves, which peft refuses. Nor
    have maps that are more than a map, such as a mixture's router.

    Source: Hu et al. 2022, arXiv 2106.09685. The model's outputs stay as they were until B has learnt something.

    Raises:
        UserError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "adapter = 'lora' needs the package peft: install it with pip install 'gradmm[lora]'"
        ) from error
    routers = [name for name, layer in lm.named_modules() if isinstance(layer, torch.nn.Linear) and not _is_map(layer)]
    states = ["out_proj", "conv1d"] if lm.config.model_type in MAMBAS else []
    transposed = any(isinstance(module, Conv1D) for module in lm.modules())  # GPT-2's layers hold W the other way round
    config = LoraConfig(
        r=rank, lora_alpha=SCALE * rank, target_modules="all-linear", fan_in_fan_out=transposed,
        exclude_modules=[*states, *routers] or None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; what counts is drawn below
        inject_adapter_in_model(config, lm)
    start_lora(lm, seed)


@torch.no_grad()
def _is_map(layer: torch.nn.Linear) -> bool:
    """Whether a kind of linear layer gives one output a row, as the plain one does; a router gives several."""
    if type(layer).forward is torch.nn.Linear.forward:
        return True
    try:
        found = layer(layer.weight.new_zeros(2, layer.in_features))
    except Exception:  # it wants other inputs
        return False
    return isinstance(found, Tensor) and found.shape == (2, layer.out_features)


@torch.no_grad()
def start_lora(lm: torch.nn.Module, seed: int) -> None:
    """Give the adapter the weights of step 0: B zero, A uniform as in a linear layer, by its name and the seed."""
    for name, weights in lm.named_parameters():
        if ".lora_A." in name:
            drawn = torch.rand(weights.shape, generator=generator(seed, "LoRA", name), dtype=torch.float64)
            weights.copy_(math.sqrt(1 / weights.shape[1]) * (2 * drawn - 1))
        elif ".lora_B." in name:
            weights.zero_()


def fold_lora(lm: torch.nn.Module) -> None:
    """Add B A to the weights beside which they stand and take the adapter away: what is left is a model like any other.

    By peft's own `merge` of each layer: its `merge_and_unload` belongs to a wrapper that nothing else here needs.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in [(name, module) for name, module in lm.named_modules() if isinstance(module, LoraLayer)]:
        layer.merge()
        lm.set_submodule(name, layer.get_base_layer())

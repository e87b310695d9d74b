"""Training at one learning rate: the settings, the schedule, the order of batches and the step.

Knows nothing of where examples come from, nor of choosing among rates and steps. Letters: N examples.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from gradmm.adapters import ADAPTERS, add_lora, fold_lora, start_lora
from gradmm.classification import Encoded, score
from gradmm.errors import (
    is_number,
    is_whole,
    plain_fields,
    require,
    require_flag,
    require_whole,
    settings_from,
    short_repr,
)
from gradmm.models import Model, batches_by_length, pad_left
from gradmm.seeds import generator
from gradmm.tasks import TaskTokens

COUNTS = ("steps", "batch_size", "eval_every", "tokens_per_batch", "patience", "max_validation", "adapter_rank")


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning; the rates and steps suit about a hundred examples and ten million parameters.

    Attributes:
        steps: AdamW steps at each learning rate.
        batch_size: examples of a step; fewer if there are fewer.
        learning_rates: peaks tried one after the other; after `warmup` steps the rate falls linearly to zero.
        eval_every: steps between looks at the validation examples; step 0 and the last are always looked at.
        patience: looks without a better validation accuracy after which a rate is given up; None goes on to the end.
        warmup: steps of linear rise.
        weight_decay: of AdamW, on every parameter.
        gradient_clip: largest norm of the whole gradient.
        max_validation: validation examples used at most, drawn with the seed; None uses all.
        tokens_per_batch: tokens of one pass, padding included; a step's batch is cut in pieces of similar length, which
            changes speed and memory but not the gradient.
        autocast: compute in bfloat16 with weights kept in float32 (float64 models are left alone); seldom faster on a
            CPU.
        adapter: what learns: None is every parameter, "lora" a LoRA adapter beside every linear layer but the head,
            which wants rates about ten times higher and needs the extra `gradmm[lora]`.
        adapter_rank: rank of the adapter's matrices.
        seed: names every random draw.
    """

    steps: int = 60
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (5e-5, 2e-4)
    eval_every: int = 10
    patience: int | None = 3
    warmup: int = 10
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    max_validation: int | None = 300
    tokens_per_batch: int = 512
    autocast: bool = False
    adapter: str | None = None
    adapter_rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        rates = self.learning_rates
        require(
            isinstance(rates, list | tuple)
            and len(rates) > 0
            and all(is_number(rate) and 0 < rate < 1 for rate in rates),
            f"learning_rates = {short_repr(rates)}, each must be above 0 and below 1: give a list such as "
            "[0.00005, 0.0002]",
        )
        object.__setattr__(self, "learning_rates", tuple(float(rate) for rate in rates))
        for name in COUNTS:
            value = getattr(self, name)
            optional = name in ("patience", "max_validation") and value is None
            require(
                optional or (is_whole(value) and value >= 1),
                f"{name} = {short_repr(value)}, it must be a whole number of at least 1: the default is "
                f"{_default(name)}",
            )
        for name in ("warmup", "weight_decay"):
            value = getattr(self, name)
            require(
                is_number(value) and value >= 0,
                f"{name} = {short_repr(value)}, it must be at least 0: the default is {_default(name)}",
            )
        require(
            is_number(self.gradient_clip) and self.gradient_clip > 0,
            f"gradient_clip = {short_repr(self.gradient_clip)}, it must be above 0: the default is 1.0",
        )
        require_flag(self.autocast, "autocast")
        require_whole(self.seed, "seed")
        require(
            self.adapter in (None, *ADAPTERS),
            f"the adapter {short_repr(self.adapter)} is not known: use None or one of {', '.join(ADAPTERS)}",
        )

    @staticmethod
    def from_dict(values: dict) -> "FinetuneConfig":
        """Settings from plain values; unknown names are errors.

        Raises:
            UserError: a name that is no setting, or a value that a setting cannot have.
        """
        return settings_from(FinetuneConfig, values)


def _default(name: str):
    return next(item.default for item in fields(FinetuneConfig) if item.name == name)


def trainable_copy(model: Model, config: FinetuneConfig | None = None) -> Model:
    """A copy of the model that learns; half precision would lose small updates, so it becomes float32.

    Args:
        config: its `adapter` says what learns; None: every parameter.

    Raises:
        UserError: an adapter whose package is not installed.
    """
    lm = copy.deepcopy(model.lm).eval()
    if model.dtype in (torch.float16, torch.bfloat16):
        lm = lm.float()
    lm.requires_grad_(config is None or config.adapter is None)
    if config is not None and config.adapter == "lora":
        add_lora(lm, config.adapter_rank, config.seed)
    return replace(model, lm=lm)


def restart(trained: Model, model: Model, config: FinetuneConfig) -> None:
    """Give a `trainable_copy` of a model the weights of step 0 again."""
    if config.adapter == "lora":
        start_lora(trained.lm, config.seed)
    else:
        trained.lm.load_state_dict(model.lm.state_dict())


def learnt_weights(trained: Model) -> dict[str, Tensor]:
    """Copies of the weights that learn, by name."""
    return {name: weights.detach().clone() for name, weights in trained.lm.named_parameters() if weights.requires_grad}


def finish(trained: Model, weights: dict[str, Tensor], config: FinetuneConfig) -> None:
    """Give a `trainable_copy` the `learnt_weights` of some step, and make of it a model that learns no more."""
    trained.lm.load_state_dict(weights, strict=False)
    if config.adapter == "lora":
        fold_lora(trained.lm)
    trained.lm.requires_grad_(False)


def adamw(model: Model, rate: float, config: FinetuneConfig) -> torch.optim.AdamW:
    """The optimizer of the weights that learn; `train_at_rate` moves its rate."""
    fused = model.device.type in ("cpu", "cuda")
    learning = [weights for weights in model.lm.parameters() if weights.requires_grad]
    groups = [{"params": learning, "initial_lr": rate}]  # the peak, which a schedule that goes on asks for
    return torch.optim.AdamW(groups, lr=rate, weight_decay=config.weight_decay, fused=fused)


def optimizer_state(model: Model, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What an optimizer keeps of each weight that has learnt: `moment/weight` -> tensor."""
    learning = [(name, weights) for name, weights in model.lm.named_parameters() if weights in optimizer.state]
    return {f"{key}/{name}": value for name, weights in learning for key, value in optimizer.state[weights].items()}


def restore_optimizer(model: Model, optimizer: torch.optim.AdamW, held: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_state`, for a new optimizer."""
    for name, weights in model.lm.named_parameters():
        moments = {
            key.split("/")[0]: value.to(weights.device) for key, value in held.items() if key.split("/")[1] == name
        }
        if moments:
            optimizer.state[weights] = moments


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
    order = islice(_order(len(data.sequences), config), begin, None)
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
        losses.append(_step(model, tokens, data, next(order), optimizer, config))
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
        found = score(model, tokens, looks, config.tokens_per_batch)
    return {
        "learning_rate": rate,
        "step": step,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "validation_loss": found.loss,
        "validation_accuracy": found.accuracy,
    }


def _order(count: int, config: FinetuneConfig):
    """Batches of row numbers without end: every row once in each pass, passes joined so that no batch is smaller."""
    size, turn = min(config.batch_size, count), 0
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator(config.seed, "fine-tuning order", turn)).tolist()
            turn += 1
        yield waiting[:size]
        waiting = waiting[size:]


def _step(model: Model, tokens: TaskTokens, data: Encoded, rows: list[int], optimizer, config: FinetuneConfig) -> float:
    """One AdamW step on the mean loss of a batch; returns that loss before the step."""
    optimizer.zero_grad()
    sequences, total = [data.sequences[row] for row in rows], 0.0
    for piece in batches_by_length(sequences, config.tokens_per_batch):
        ids, mask = pad_left([sequences[place] for place in piece], model.device)
        with _precision(model, config):
            hidden = model.last_hidden(model.embed(ids), mask)
        labels = data.labels[[rows[place] for place in piece]]
        loss = cross_entropy(model.logits_of(hidden, tokens.labels), labels, reduction="sum") / len(rows)
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.lm.parameters(), config.gradient_clip)
    optimizer.step()
    return total


def _precision(model: Model, config: FinetuneConfig):
    enabled = config.autocast and model.dtype == torch.float32
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)

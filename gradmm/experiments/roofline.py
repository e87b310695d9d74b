r"""What the inner steps and projections of a synthesis must compute and move, whatever the code: their time's floor.

Arithmetic alone: knows shapes, no clock and no machine. Operations are those of matrix products, a multiplication and
an addition counted as two. Bytes are what no cache can hold from one pass to the next: every weight once a pass, the
keys and values read back, candidates' rows. What is left out makes a floor lower, never higher.

What *must* be computed: of the last layer, keys and values at every position and the rest at the last one; nothing for
a template's tokens before the text, whose keys and values are constants. A backward pass to the inputs costs a forward
pass, because the weights are frozen; attention costs twice, over the whole rectangle of queries and keys.

Letters: K groups, B texts of a group, N texts, L tokens, T positions, D width, V vocabulary, n real examples, k
candidates.
"""

from dataclasses import dataclass

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from gradmm.device import layers_of
from gradmm.errors import require
from gradmm.gradients import FactorTarget
from gradmm.models import Model
from gradmm.plan import Plan
from gradmm.spaces import linear_maps

PHASES = ("inner steps", "projection")  # where most of the time of a search goes


@dataclass(frozen=True)
class Cost:
    """Operations of matrix products, and bytes to or from memory."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.operations * times, self.bytes * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Body:
    """What the cost of a language model follows from.

    Attributes:
        width, vocabulary: D and V.
        layers: the numbers in the linear maps of each layer.
        keys: the numbers in the key and value maps of one layer.
        cached: keys and values of a token in one layer, in numbers.
        attended: heads times their width.
        outside: the numbers in the body's linear maps outside its layers.
        parameters: all of the model.
        largest: (inputs, outputs) of the largest linear map.
        number: bytes of a number.
    """

    width: int
    vocabulary: int
    layers: tuple[int, ...]
    keys: int
    cached: int
    attended: int
    outside: int
    parameters: int
    largest: tuple[int, int]
    number: int = 4

    @staticmethod
    def of(model: Model) -> "Body":
        """Read it off a model's modules and configuration; the model may be on the device "meta".

        Raises:
            UserError: a model whose layers stand in no list.
        """
        layers = layers_of(model.lm)
        require(bool(layers), f"{model.name} has no list of layers to count: give a transformer")
        maps = [sum(_numbers(part) for part in layer.modules()) for layer in layers]
        config = model.lm.config.get_text_config()
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        cached = 2 * head * (getattr(config, "num_key_value_heads", None) or heads)
        vocabulary, width = model.head_weight.shape
        return Body(
            width=width,
            vocabulary=vocabulary,
            layers=tuple(maps),
            keys=cached * config.hidden_size,
            cached=cached,
            attended=heads * head,
            outside=sum(map(_numbers, linear_maps(model).values())) - sum(maps),
            parameters=sum(weights.numel() for weights in model.lm.parameters()),
            largest=max((_sides(part) for part in linear_maps(model).values()), key=lambda sides: sides[0] * sides[1]),
            number=model.head_weight.element_size(),
        )

    @staticmethod
    def of_config(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> "Body":
        """Of an architecture alone: no weight is made."""
        with torch.device("meta"):
            lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        return Body.of(Model(lm, None, config.model_type, None, ""))

    def forward(self, texts: int, positions: float, before: int = 0) -> Cost:
        """One pass of the body to the states of the last position.

        Args:
            texts, positions: N and T.
            before: positions whose keys and values are known.
        """
        maps, attention = self._parts(texts, positions, before)
        return Cost(maps + attention, self._weights())

    def backward(self, texts: int, positions: float, before: int = 0) -> Cost:
        """From the last position's states to the inputs, after `forward`."""
        maps, attention = self._parts(texts, positions, before)
        return Cost(maps + 2 * attention, self._weights())

    def head(self, states: int) -> Cost:
        """The logits of some states, or the states' gradient from the logits'."""
        return Cost(2 * states * self.vocabulary * self.width, self.vocabulary * self.width * self.number)

    def walk(self, texts: int, length: int, prompt: int, prompts: int, candidates: int = 0) -> Cost:
        """L tokens of N texts, each token by one step with the cache of those before it.

        Args:
            prompt: tokens of a prompt.
            prompts: number of prompts, each read once.
            candidates: k rows of a table that each token's vector is compared with.
        """
        steps, read = length - 1, sum(range(prompt + 1, prompt + length))  # the last token is read by nobody
        maps = 2 * texts * (sum(self.layers) + self.outside)
        attention = 4 * texts * self.attended * len(self.layers)
        cache = texts * self.cached * len(self.layers) * self.number
        moving = Cost(steps * maps + read * attention, steps * self._weights() + read * cache)
        distinct = min(texts * candidates, self.vocabulary)
        rows = Cost(2 * texts * candidates * self.width, distinct * self.width * self.number)
        return self.forward(prompts, prompt) + moving + length * (self.head(texts) + rows)

    def _parts(self, texts: int, positions: float, before: int) -> tuple[float, float]:
        """Operations of the linear maps and of attention, forward."""
        whole = 2 * positions * (sum(self.layers) + self.outside)
        square = 4 * positions * (before + positions) * self.attended
        idle = 2 * (positions - 1) * (self.layers[-1] - self.keys)
        narrow = 4 * (before + positions) * self.attended
        return texts * (whole - idle), texts * (square * (len(self.layers) - 1) + narrow)

    def _weights(self) -> float:
        return (sum(self.layers) + self.outside) * self.number


def _numbers(part: torch.nn.Module) -> int:
    return part.weight.numel() if isinstance(part, torch.nn.Linear | Conv1D) else 0


def _sides(part: torch.nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map; GPT-2's hold their matrix the other way round."""
    first, second = part.get_parameter("weight").shape
    return (first, second) if isinstance(part, Conv1D) else (second, first)


# ---------------------------------------------------------------- a synthesis


@dataclass(frozen=True)
class Workload:
    """What a synthesis is asked for; the defaults are the paper's setting with phi-1.5's tokens for SST-2.

    Attributes:
        groups, count, length: K, B and L; every text is taken to have all L tokens.
        before, after: tokens of the template before and after a text.
        prompt, classes: tokens of a generation prompt, and how many there are.
        real: real examples of all classes together, as long as the texts; 0: a target held as a matrix.
        outer_steps, inner_steps, candidates: of the search: candidates of each position.
    """

    groups: int = 20
    count: int = 10
    length: int = 25
    before: int = 1
    after: int = 2
    prompt: int = 8
    classes: int = 2
    real: int = 50
    outer_steps: int = 30
    inner_steps: int = 50
    candidates: int = 200

    @staticmethod
    def of(plan: Plan) -> "Workload":
        """What a plan is going to do."""
        tokens, config = plan.tokens, plan.config
        return Workload(
            groups=len(plan.classes),
            count=config.group_size,
            length=plan.length,
            before=len(tokens.start + tokens.prefix),
            after=len(tokens.suffix),
            prompt=max(map(len, tokens.prompts)),
            classes=len(tokens.labels),
            real=sum(len(target.factors.delta) for target in plan.release.targets if isinstance(target, FactorTarget)),
            outer_steps=config.outer_steps,
            inner_steps=config.inner_steps,
            candidates=config.top_k,
        )

    @property
    def texts(self) -> int:
        """N, of all groups."""
        return self.groups * self.count

    @property
    def positions(self) -> int:
        """T, those that are no constants: a text and what follows it."""
        return self.length + self.after


def evaluation(body: Body, job: Workload) -> Cost:
    """The matching loss of every group."""
    return body.forward(job.texts, job.positions, job.before) + body.head(job.texts) + _matching(body, job, job.count)


def inner_step(body: Body, job: Workload) -> Cost:
    """The matching loss of every group and its gradient in x."""
    back = body.backward(job.texts, job.positions, job.before)
    return evaluation(body, job) + back + body.head(job.texts) + _matching(body, job, job.count)


def projection(body: Body, job: Workload) -> Cost:
    """Every position of every text replaced by a token."""
    return body.walk(job.texts, job.length, job.prompt, job.classes, job.candidates)


def synthesis(body: Body, job: Workload) -> dict[str, Cost]:
    """Each of PHASES of a whole synthesis, all its steps together; the last x is projected too."""
    steps = job.outer_steps * job.inner_steps
    return {"inner steps": steps * inner_step(body, job), "projection": (job.outer_steps + 1) * projection(body, job)}


def _matching(body: Body, job: Workload, together: int) -> Cost:
    """The distances of N gradients, in sets of `together`, to the target, one way; backward costs the same."""
    sides = body.vocabulary + body.width
    numbers = job.real * sides if job.real else job.classes * body.vocabulary * body.width
    inner = job.real / job.classes * sides if job.real else body.vocabulary * body.width
    return Cost(2 * job.texts * (inner + together * sides), 4 * numbers)


def products(body: Body, job: Workload) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of products in the phases: the largest map, for a group and for all, and the head."""
    group = job.count * job.positions
    return [(group, *body.largest), (group * job.groups, *body.largest), (job.texts, body.width, body.vocabulary)]

"""How much memory a synthesis takes: arithmetic on shapes, which judges a card's size before anything is loaded.

Knows no tensors. Every phase of the pipeline is counted by its largest blocks of numbers; what frameworks keep beside
them (kernels, caches of an allocator, the interpreter) is not. Letters: K groups, B examples of a group, L tokens, D
width, V vocabulary, n real examples.
"""

from dataclasses import dataclass

from gradmm.evaluation import LOGITS_AT_ONCE
from gradmm.generation import Sampling
from gradmm.matching import ROWS_PER_BLOCK
from gradmm.models import TOKENS_PER_BATCH, Model

# Numbers a layer, token and width unit held between forward and backward: 10 to 22 by family, measured.
ACTIVATION_NUMBERS = 24


@dataclass(frozen=True)
class ModelShape:
    """A language model in numbers.

    Attributes:
        layers, width, inner, vocabulary: of the body (inner: width within a feed-forward block) and the head.
        weights: numbers in all, shared ones once.
        bytes: of one number.
    """

    layers: int
    width: int
    inner: int
    vocabulary: int
    weights: int
    bytes: int

    @property
    def wide(self) -> int:
        """Bytes of a number of the ADMM state and of matching sums: float32 at least."""
        return max(4, self.bytes)

    @staticmethod
    def of(model: Model) -> "ModelShape":
        """A loaded model's."""
        config, width = model.lm.config, model.head_weight.shape[1]
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * width
        weights = sum(weight.numel() for weight in model.lm.parameters())
        return ModelShape(
            config.num_hidden_layers, width, inner, model.head_weight.shape[0], weights, model.dtype.itemsize
        )


@dataclass(frozen=True)
class Work:
    """A synthesis in numbers.

    Attributes:
        groups, count, length: K, B, L.
        positions: tokens of a text with its template.
        prompt: tokens of the longest generation prompt.
        batch: groups that are projected together.
        together: groups that an inner step sees at once.
        top_k: candidates of a projection.
        targets: numbers in the released targets.
        gathered: numbers of candidates' rows that a projection holds at once, see `projection.gathered_numbers`.
    """

    groups: int
    count: int
    length: int
    positions: int
    prompt: int
    batch: int
    together: int
    top_k: int
    targets: int
    gathered: int


def groups_at_once(shape: ModelShape, positions: int, count: int, most: int) -> int:
    """As many groups as keep the activations of an inner step within the size of the weights, from 1 to `most`."""
    return min(most, max(1, shape.weights // _activations(shape, positions, count)))


def _activations(shape: ModelShape, positions: int, texts: int) -> int:
    return ACTIVATION_NUMBERS * shape.layers * shape.width * positions * texts


def expected_bytes(shape: ModelShape, work: Work) -> dict[str, int]:
    """What a synthesis takes.

    Returns:
        Bytes that are held throughout (`weights`, `targets`, `state`: x and lam of one batch of groups, and the
        tables), bytes that each phase adds (`start`, `inner_steps`, `projection`, `judging`), and `peak`: all that is
        held and the largest phase.
    """
    texts, rows = work.groups * work.count, work.batch * work.count
    state = work.count * work.length * shape.width * shape.wide  # x or lam of one group
    candidates = work.top_k * shape.width  # of one text's place: one list is gathered at least
    held = {
        "weights": shape.weights * shape.bytes,
        "targets": work.targets * shape.wide,
        "state": 2 * work.batch * state + shape.vocabulary * shape.wide,
    }
    phases = {
        "start": _decode(shape, work, min(rows, Sampling.batch_size), 5) + 2 * work.batch * state,
        "inner_steps": max(
            _inner_steps(shape, work) + 2 * work.batch * state + 8 * work.together * state, 8 * work.batch * state
        ),
        "projection": _decode(shape, work, rows, 3)
        + min(max(work.gathered, candidates), rows * candidates)
        * (shape.wide + shape.bytes * (shape.bytes < shape.wide))
        + 4 * work.batch * state,
        "judging": _judging(shape, texts, work.positions),
    }
    return {**held, **phases, "peak": sum(held.values()) + max(phases.values())}


def _inner_steps(shape: ModelShape, work: Work) -> int:
    """Activations, and five blocks of the vocabulary's width: logits, probabilities, delta and two gradients."""
    texts = work.together * work.count
    return _activations(shape, work.positions, texts) * shape.bytes + 5 * texts * shape.vocabulary * shape.wide


def _decode(shape: ModelShape, work: Work, rows: int, blocks: int) -> int:
    """Texts read token by token: keys and values, and some blocks of the vocabulary's width."""
    cached = 2 * (shape.layers + 1) * shape.width * (work.prompt + work.length) * rows * shape.bytes
    return cached + blocks * rows * shape.vocabulary * shape.wide


def _judging(shape: ModelShape, texts: int, positions: int) -> int:
    """The largest of: a pass without gradients (four blocks of a feed-forward block's width and eight of the hidden
    width); its states with a block of logits in two types and their logarithms; a block of texts' logits, probabilities
    and deltas."""
    tokens, some = min(TOKENS_PER_BATCH, texts * positions), min(ROWS_PER_BLOCK, texts)
    states = 2 * tokens * shape.width * shape.bytes
    return max(
        tokens * (4 * shape.inner + 8 * shape.width) * shape.bytes,
        states + min(LOGITS_AT_ONCE, tokens * shape.vocabulary) * (2 * shape.wide + shape.bytes),
        states + some * shape.vocabulary * (3 * shape.wide + shape.bytes),
    )

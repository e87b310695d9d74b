"""The settings of a synthesis, named ones, those of a release and of a fine-tuning.

Knows no model and no text: what a setting means is told where it is used. Letters: B examples of a group, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from gradmm import admm
from gradmm.errors import (
    COUNT,
    FLAG,
    WHOLE,
    Rule,
    above_zero,
    at_least,
    check_settings,
    is_number,
    near,
    one_of,
    require,
    require_settings,
    require_texts,
    short_repr,
)
from gradmm.gradients import DISTANCES
from gradmm.initialisation import INITIALISATIONS
from gradmm.markup import code
from gradmm.mechanism import CLAIM
from gradmm.projection import PROJECTIONS
from gradmm.selection import FILTERS, RANKINGS

SEARCHES = ("admm", "pool")
ADAPTERS = ("lora",)
RULES = {
    **{name: admm.RULES[name] for name in ("outer_steps", "inner_steps", "rho", "lr")},
    **dict.fromkeys(("n_synthetic", "group_size", "top_k", "length", "init_candidates", "groups_per_batch"), COUNT),
    "oversample": at_least(1),
    "perplexity_weight": at_least(0),
    "seed": WHOLE,
    "temperature": above_zero(1.0),
    "search": one_of(SEARCHES),
    "init": one_of(INITIALISATIONS),
    "projection": one_of(PROJECTIONS),
    "filter": one_of(FILTERS),
    "distance": one_of(DISTANCES),
    "ranking": one_of(RANKINGS),
}


@dataclass(frozen=True)
class SynthesisConfig:
    """Settings of a synthesis; `PRESETS` has others than the defaults, published ones too.

    No record shows another choice to teach more than the defaults: `05-ablations` changes one after the other.

    Attributes:
        n_synthetic: texts to keep in all, at least one a class; classes get as equal a number as possible.
        oversample: texts written for each text kept, at least 1; the filter and the ranking choose. A pool needs many,
            and they cost little; 2 of ADMM's cost more.
        group_size: B, texts that match the target together.
        outer_steps, inner_steps, rho, lr: see `admm.Config`. A token changes when lam / rho outgrows the distance
            between neighbouring embeddings; f's gradients are small, so a rho as large as the published ones leaves
            generated starts as they are.
        projection, top_k: the order (a name in `projection.PROJECTIONS`) and its number of candidates.
        search: a name in SEARCHES: "pool" has the model write `oversample` times as many finished texts from the public
            prompts and leaves the rest to filter and ranking. "admm" moves texts towards the target, as published (all
            settings of groups, the solver, the projection and the start are its own); it needs a Release of a space of
            the head, and `PRESETS` has the ranking and the oversample that suit it.
        length: L, tokens of a text behind the words that its prompt begins it with, of a pool at most twice as
            many; None takes the Release's.
        temperature: of the texts that a pool writes or that ADMM starts from, see `generation.Sampling`; 1 samples from
            the model.
        distance: "cosine" or "l2".
        init: "generated" starts x at texts that the model writes from the public prompts, which may end before L
            tokens as they do (`plan.MIN_TOKENS` at least); "normal", as published, at random vectors, and every text
            has L tokens.
        init_candidates: draws of each group, which starts as the one with the lowest matching loss.
        filter: a name in `selection.FILTERS`. A model that cannot yet do the task misreads the labels, and its filter
            then teaches its own mistakes: "none" by default, "label" as published.
        ranking: a name in RANKINGS: "text" keeps the texts of each class that match the target best one by one, "group"
            those that, added one after the other, match it best together.
        perplexity_weight: this times the log-perplexity, of a group the mean, is added to the matching loss. With 0.01
            texts read as easily as those that were not chosen, and match about as well (`05-ablations`).
        groups_per_batch: the unit of work: groups that are projected together, saved together and given to one process
            together. None follows from the number and size of the groups (`work_units`), never from the memory or the
            number of processes, so that none of these can change a result.
        seed: names every random draw.
    """

    n_synthetic: int = 100
    oversample: float = 20.0
    group_size: int = 10
    outer_steps: int = 10
    inner_steps: int = 20
    rho: float = 0.003
    lr: float = 0.008
    projection: str = "lm_then_nearest"
    top_k: int = 50
    search: str = "pool"
    length: int | None = None
    temperature: float = 1.0
    distance: str = "cosine"
    init: str = "generated"
    init_candidates: int = 4
    filter: str = "none"
    ranking: str = "group"
    perplexity_weight: float = 0.0
    groups_per_batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, RULES)

    @property
    def solver(self) -> admm.Config:
        """The solver's part of these settings."""
        return admm.Config(self.rho, self.outer_steps, self.inner_steps, self.lr)

    @property
    def space(self) -> str:
        """The release space that suits the search: "body", which training follows, for a pool; "head" for ADMM."""
        return "body" if self.search == "pool" else "head"

    @property
    def private_space(self) -> str:
        """The same with epsilon: one of few coordinates, so that there is little room for noise."""
        return "body_subspace" if self.search == "pool" else "label_rows"


# ---------------------------------------------------------------- named settings

_ADMM: dict[str, Any] = {"search": "admm", "ranking": "text", "oversample": 2.0}
_PUBLISHED: dict[str, Any] = {
    **_ADMM,
    "n_synthetic": 100,
    "outer_steps": 30,
    "inner_steps": 50,
    "rho": 0.01,  # the paper tries 0.01, 0.1, 0.5, 1 and 5; notebooks/params takes the smallest too
    "lr": 0.008,
    "top_k": 200,
    "init": "normal",
    "init_candidates": 500,
    "filter": "label",
    "perplexity_weight": 0.05,
}
PRESETS: dict[str, SynthesisConfig] = {
    "pool": SynthesisConfig(),
    "admm": SynthesisConfig(**_ADMM),  # from generated texts and with a small rho, so that its texts stay readable
    "paper": SynthesisConfig(projection="lm_then_nearest", **_PUBLISHED),
    "official": SynthesisConfig(projection="nearest_then_lm", **_PUBLISHED),
}


def preset(name: str, **changes) -> SynthesisConfig:
    """The settings that a name stands for, with some of them changed.

    Args:
        name: one of `PRESETS`.
        changes: settings of `SynthesisConfig`. None leaves what the preset says, so a wrapper can hand on parameters
            that nobody set. Where None is the value that you want, use `dataclasses.replace`.

    Raises:
        UserError: an unknown name or setting, or a value that a setting cannot have.

    Example:
        >>> import gradmm
        >>> gradmm.preset("paper", rho=None) == gradmm.PRESETS["paper"]
        True
        >>> gradmm.preset("paper", rho=0.1).rho
        0.1
        >>> gradmm.preset("ADMM")
        Traceback (most recent call last):
        gradmm.errors.UserError: search = 'ADMM' is not known: did you mean admm?
    """
    known = isinstance(name, str) and name in PRESETS
    require(known, f"search = {short_repr(name)} is not known: {near(str(name), PRESETS, 'use one of')}")
    require_settings(SynthesisConfig, changes)
    return replace(PRESETS[name], **{setting: value for setting, value in changes.items() if value is not None})


def described(name: str, config: SynthesisConfig) -> str:
    """What a run is made with, in Markdown: the preset, what was changed in it, and what is other than the defaults."""
    changed, apart = (_differing(config, other) for other in (PRESETS[name], SynthesisConfig()))
    start = f"Settings: {code(f'gradmm.PRESETS[{name!r}]')}" + (f" with {changed}" if changed else " as it is")
    if apart and apart != changed:
        start += f". Other than the package's defaults are {apart}"
    return f"{start}."


def _differing(config: SynthesisConfig, other: SynthesisConfig) -> str:
    given = [(item.name, getattr(config, item.name)) for item in fields(config)]
    return ", ".join(code(f"{name} = {value!r}") for name, value in given if value != getattr(other, name))


# ---------------------------------------------------------------- a release


@dataclass(frozen=True)
class ReleaseConfig:
    """Settings of a release: its privacy, its coordinates, and the length of the texts that are to follow it.

    Attributes:
        epsilon: None releases the exact gradients without privacy; otherwise a positive number.
        delta: the chance with which epsilon may fail, at most 0.01; needed with epsilon. The usual advice is well below
            1 / number of examples: who hands out each example as it is with the chance delta keeps to it.
        clip: the largest L2 norm of one example's gradient in the release space (clip, relation and calibration act
            with epsilon alone).
        space: of the head's gradient under the loss over all tokens: "head" (V x D), "label_rows" (the C labels' rows,
            C x D), "label_rows_subspace" (C x r: those rows times the first r principal directions of the hidden states
            of `public_texts`) or "label_rows_centred" (C x r: the same without the first direction, which nearly all
            texts share: it takes most of the clip and says little of what sets the classes apart). Under the loss that
            fine-tuning uses, over the label tokens alone, with the model's preference among them taken out, and for
            `search = "pool"` alone: "body" (`spaces.BodySketch`, a sketch of every linear map's gradient: what
            fine-tuning follows) or "body_subspace" (r numbers: the sketch along the first r principal directions of
            public texts' sketches, without what texts of a class share whatever they say, in units of these texts'
            median length; texts are compared with it in the whole sketch). None takes "body" without epsilon and
            "body_subspace" with it: the smaller the space, the less noise, and of the small ones it keeps the most of
            what sets the classes apart (notebook 04 measures it). The paper matches "head"; ADMM takes what is of the
            head.
        relation: which data sets are neighbours: "replace-one" (one example, label included, becomes another) or
            "add-remove" (one example comes or goes).
        calibration: "exact"; "classic" and "zhao2019" use more noise and serve to reproduce published figures.
        length: L, tokens of a synthetic text; public, hence needed with epsilon; None takes the real texts' mean
            without.
        public_texts: texts that are not private: needed for the two subspaces of the label rows; for "body" what the
            model's preference is measured on, for "body_subspace" that and where its directions come from (None: texts
            that the model writes from the public prompts, as many as the estimate needs, see `spaces.own_texts`).
        directions: r; None takes 16, or as many as the texts span if fewer.
        noise_seed: fixes the noise for a repeatable experiment; the Release is then marked as not private.
    """

    epsilon: float | None = None
    delta: float | None = None
    clip: float = 1.0
    space: str | None = None
    relation: str = "replace-one"
    calibration: str = "exact"
    length: int | None = None
    public_texts: Sequence[str] | None = None
    directions: int | None = None
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        check_settings(self, CLAIM | {"length": COUNT, "directions": COUNT, "noise_seed": WHOLE})
        require(
            self.epsilon is None or self.length is not None,
            f"epsilon = {self.epsilon} without a length, and the real texts' own length is private: give length, the "
            "tokens of a synthetic text",
        )
        alone = [name for name in ("delta", "noise_seed") if getattr(self, name) is not None]
        require(
            self.epsilon is not None or not alone,
            f"{', '.join(alone)} without epsilon, nothing would be private: give epsilon, or leave them out",
        )
        require(
            self.epsilon is None or self.delta is not None,
            f"epsilon = {self.epsilon} without delta: give delta too, well below 1 / number of examples",
        )
        if self.public_texts is not None:
            object.__setattr__(self, "public_texts", tuple(require_texts(self.public_texts, "public_texts")))

    @property
    def space_name(self) -> str:
        """The release space by name, chosen where none is given."""
        return self.space or ("body" if self.epsilon is None else "body_subspace")


# ---------------------------------------------------------------- fine-tuning

_COUNTS = (
    "steps",
    "batch_size",
    "eval_every",
    "patience",
    "max_validation",
    "tokens_per_batch",
    "adapter_rank",
    "layers",
)
_FINETUNING = {
    **dict.fromkeys(_COUNTS, COUNT),
    "learning_rates": Rule(
        lambda rates: (
            isinstance(rates, list | tuple)
            and len(rates) > 0
            and all(is_number(rate) and 0 < rate < 1 for rate in rates)
        ),
        "{name} = {value}, each must be above 0 and below 1: give a list such as [0.00005, 0.0002]",
    ),
    "warmup": at_least(0),
    "weight_decay": at_least(0),
    "gradient_clip": above_zero(1.0),
    "autocast": FLAG,
    "adapter": one_of(ADAPTERS),
    "seed": WHOLE,
}


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
            changes speed and memory but not the gradient. None: 512 on a CPU, on a GPU what its memory holds.
        autocast: compute in bfloat16 with weights kept in float32 (float64 models are left alone); seldom faster on a
            CPU. None: on a GPU that multiplies it fast.
        adapter: what learns: None is every parameter, "lora" a LoRA adapter beside every linear layer but the head,
            which wants rates about ten times higher and needs the extra `gradmm[lora]`.
        adapter_rank: rank of the adapter's matrices.
        layers: how many of the last layers learn, and the norms behind them, where no adapter does; None is every
            parameter. A fifth of them halves a step's time and takes a fifth of the memory of gradients and moments.
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
    tokens_per_batch: int | None = None
    autocast: bool | None = None
    adapter: str | None = None
    adapter_rank: int = 8
    layers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, _FINETUNING)
        both = (
            f"adapter = {self.adapter!r} and layers = {self.layers}: give one of them, what learns is one or the other"
        )
        require(self.adapter is None or self.layers is None, both)
        object.__setattr__(self, "learning_rates", tuple(float(rate) for rate in self.learning_rates))

"""The settings of a synthesis, and named ones.

Knows no model and no text: what a setting means is told where it is used. Letters: B examples of a group, L tokens.
"""

from dataclasses import dataclass, field, fields, replace

from gradmm import admm
from gradmm.errors import (
    is_number,
    is_whole,
    near,
    plain_fields,
    require,
    require_flag,
    require_settings,
    require_whole,
    settings_from,
    shown,
)
from gradmm.gradients import DISTANCES
from gradmm.initialisation import CHOICES, INITIALISATIONS
from gradmm.markup import code
from gradmm.projection import PROJECTIONS
from gradmm.selection import FILTERS, RANKINGS

SEARCHES = ("admm", "pool", "guided", "swap")
ENDS = ("token", "sentence")


@dataclass(frozen=True)
class SynthesisConfig:
    """Settings of a synthesis. The defaults are what won on validation data; `PRESETS` holds others, the published ones too.

    Attributes:
        n_synthetic: texts to keep in all, at least one a class; classes get as equal a number as possible.
        oversample: texts written for each text kept, at least 1; the filter and the ranking choose. A pool needs many, and
            they cost little; 2 of ADMM's cost more.
        group_size: B, texts that match the target together.
        outer_steps, inner_steps, rho, lr, gradient_clip, balance_rho: see `admm.Config`. A token changes when lam / rho
            outgrows the distance between neighbouring embeddings; f's gradients are small, so a rho as large as the
            published ones leaves generated starts as they are.
        projection, top_k: the order (a name in `projection.PROJECTIONS`) and its number of candidates.
        search: a name in SEARCHES: "pool" has the model write `oversample` times as many finished texts from the public prompts
            and leaves the rest to filter and ranking. The others need a Release of the head; `PRESETS` has for each a ranking
            and an oversample that suit it. "admm" moves texts towards the target, as published (all settings of the solver,
            the projection and the start are its own). "guided" starts as admm does, has the model write every text anew in each
            of `outer_steps` rounds, led by the gradient at the last ones, and keeps the best round of each group. "swap" takes the
            texts that "pool" with ranking "group" keeps and replaces single tokens in up to `outer_steps` rounds, so that the
            texts of a class together come closer to the target (`swaps.Swapper`); it needs `early_end`.
        guidance_weight: guided: what a token gains, in nats, that lowers f to first order by one standard deviation more than
            the mean token at its place (`projection.embedding_spread`), at least 0.
        temperature: guided: tokens are drawn from the softmax of their scores divided by this; 0 takes the best score, and then
            texts that have the same prompt easily become the same text.
        beams: guided: texts that are kept side by side while one is written, ranked by their mean score; 1 takes the best token.
        tries: swap: replacements of each text that a round measures exactly, out of its `top_k` a position.
        fluency_slack: swap: how far the log-perplexity of a text may rise above where it began, at least 0.
        length: L, tokens of a text; None takes the Release's.
        early_end, min_tokens: whether a text may end before L tokens, and not before how many.
        end_at: "token" ends a text where the order chooses the end token, "sentence" after the first token that ends a sentence
            (`generation.closing_tokens`) and nowhere else; it needs `early_end`.
        distance: "cosine" or "l2".
        init: "generated" starts x at texts that the model writes from the public prompts (it needs `early_end`), "normal" at
            random vectors as published.
        init_candidates, init_norm: draws of each group, and the norm that random vectors are scaled to (None: the mean norm of
            the embeddings).
        init_choice: "best" starts a group as its draw with the lowest matching loss, as published; "greedy" puts it together
            from the texts of all its draws, which at the same cost starts lower; 25 draws for 500 cost a twentieth.
        filter: a name in `selection.FILTERS`. A model that cannot yet do the task misreads the labels, and its filter then
            teaches its own mistakes: "none" by default, "label" as published.
        ranking: a name in RANKINGS: "text" keeps the texts of each class that match the target best one by one, "group"
            those that, added one after the other, match it best together, "joint" those that, added to the classes in turn,
            best match each class's target and the sum of all classes' targets, which balanced training follows.
        perplexity_weight: ranking "text" adds this times the log-perplexity to the matching loss.
        groups_per_batch: the unit of work: groups that are projected together, saved together and given to one process
            together. None follows from the number and size of the groups (`work_units`), never from the memory or the
            number of processes, so that none of these can change a result.
        seed: names every random draw.
        solver: the solver's part of these settings; follows from them.
    """

    n_synthetic: int = 100
    oversample: float = 20.0
    group_size: int = 10
    outer_steps: int = 10
    inner_steps: int = 20
    rho: float = 0.003
    lr: float = 0.008
    gradient_clip: float | None = 1.0
    balance_rho: bool = False
    projection: str = "lm_then_nearest"
    top_k: int = 50
    search: str = "pool"
    guidance_weight: float = 1.0
    temperature: float = 1.0
    beams: int = 1
    tries: int = 8
    fluency_slack: float = 0.1
    length: int | None = None
    early_end: bool = True
    min_tokens: int = 4
    end_at: str = "token"
    distance: str = "cosine"
    init: str = "generated"
    init_candidates: int = 4
    init_norm: float | None = None
    init_choice: str = "best"
    filter: str = "none"
    ranking: str = "group"
    perplexity_weight: float = 0.0
    groups_per_batch: int | None = None
    seed: int = 0
    solver: admm.Config = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("n_synthetic", "group_size", "top_k", "min_tokens", "init_candidates", "beams", "tries"):
            _require_count(name, getattr(self, name))
        for name in ("length", "groups_per_batch"):
            _require_count(name, 1 if getattr(self, name) is None else getattr(self, name))
        for name, least, mend in (("oversample", 1, "1.5 writes half as many again"), ("perplexity_weight", 0, "0 ignores it"), ("guidance_weight", 0, "1 is a nat for a standard deviation"), ("fluency_slack", 0, "0.1 is usual"), ("temperature", 0, "0 takes the best token")):
            value = getattr(self, name)
            require(is_number(value) and value >= least, f"{name} = {shown(value)}, it must be at least {least}: {mend}")
        require(
            self.init_norm is None or (is_number(self.init_norm) and self.init_norm > 0),
            f"init_norm = {shown(self.init_norm)}, it must be above 0, or None: None takes the mean norm of the embeddings",
        )
        for name in ("early_end", "balance_rho"):
            require_flag(getattr(self, name), name)
        require_whole(self.seed, "seed")
        require(self.early_end or self.init == "normal", "init = 'generated' writes texts of several lengths: set early_end, or init = 'normal'")
        for name, known in (("search", SEARCHES), ("end_at", ENDS), ("init", INITIALISATIONS), ("init_choice", CHOICES), ("projection", PROJECTIONS), ("filter", FILTERS), ("distance", DISTANCES), ("ranking", RANKINGS)):
            value = getattr(self, name)
            require(isinstance(value, str) and value in known, f"the {name} {shown(value)} is not known: use one of {', '.join(known)}")
        require(self.beams == 1 or self.search == "guided", f"beams = {self.beams} are of the guided search alone: set search = 'guided', or beams = 1")
        require(self.early_end or self.search != "swap", "search = 'swap' has texts of several lengths: set early_end")
        require(self.early_end or self.end_at == "token", "end_at = 'sentence' ends texts early: set early_end, or end_at = 'token'")
        object.__setattr__(self, "solver", self._solver())  # checks the solver's own settings

    @property
    def space(self) -> str:
        """The release space that suits the search: "body", which training follows, for a pool; "head" for those that move texts."""
        return "body" if self.search == "pool" else "head"

    def _solver(self) -> admm.Config:
        return admm.Config(
            rho=self.rho,
            outer_steps=self.outer_steps,
            inner_steps=self.inner_steps,
            lr=self.lr,
            clip=self.gradient_clip,
            balance=self.balance_rho,
        )

    @staticmethod
    def from_dict(values: dict) -> "SynthesisConfig":
        """Settings from plain values; unknown names are errors.

        Raises:
            UserError: a name that is no setting, or a value that a setting cannot have.
        """
        return settings_from(SynthesisConfig, values)


def _settings(config: SynthesisConfig) -> dict:
    """The settings that can be given; what follows from them is left out."""
    return {item.name: getattr(config, item.name) for item in fields(config) if item.init}


def _require_count(name: str, value) -> None:
    require(
        is_whole(value) and value >= 1,
        f"{name} = {shown(value)}, it must be a whole number of at least 1: give {SynthesisConfig.__dict__[name] or 1}",
    )


# ---------------------------------------------------------------- named settings

_ADMM = {"search": "admm", "ranking": "text", "oversample": 2.0}
_PUBLISHED = {
    **_ADMM,
    "n_synthetic": 100,
    "outer_steps": 30,
    "inner_steps": 50,
    "rho": 0.01,  # the paper tries 0.01, 0.1, 0.5, 1 and 5; notebooks/params takes the smallest too
    "lr": 0.008,
    "top_k": 200,
    "early_end": False,
    "init": "normal",
    "init_candidates": 500,
    "init_norm": 1.4,
    "filter": "label",
    "perplexity_weight": 0.05,
}
PRESETS: dict[str, SynthesisConfig] = {
    "pool": SynthesisConfig(),
    "admm": SynthesisConfig(**_ADMM),  # from generated texts and with a small rho, so that its texts stay readable
    "guided": SynthesisConfig(**_ADMM | {"search": "guided"}),
    "swap": SynthesisConfig(search="swap"),
    "paper": SynthesisConfig(projection="lm_then_nearest", **_PUBLISHED),
    "official": SynthesisConfig(projection="nearest_then_lm", **_PUBLISHED),
}


def preset(name: str, **changes) -> SynthesisConfig:
    """The settings that a name stands for, with some of them changed.

    Args:
        name: one of `PRESETS`.
        changes: settings of `SynthesisConfig`. None leaves what the preset says, so a wrapper can hand on parameters that nobody
            set. Where None is the value that you want, use `dataclasses.replace`.

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
    require(known, f"search = {shown(name)} is not known: {near(str(name), PRESETS, 'use one of')}")
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
    theirs = _settings(other)
    return ", ".join(code(f"{name} = {value!r}") for name, value in _settings(config).items() if value != theirs[name])

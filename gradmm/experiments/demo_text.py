"""Everyday reviews composed from a hand-written bank of clauses: the demo's labelled splits and its pretraining text.

The bank (`data/demo/bank`) holds, for each domain, context sentences and clauses by aspect and polarity; a review takes
clauses of one domain and of different aspects, so that its parts agree, and joins them with one of many frames. In a
mixed review the main clause or the conclusion decides the label. Knows no tokenizer and no model.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from gradmm import files
from gradmm.seeds import generator

DATA = Path(__file__).parents[1] / "data" / "demo"
BANK = DATA / "bank"
LABELS = ("negative", "positive")
SIZES = {"test": 600, "validation": 400, "train": 2000}
HELD_OUT = 0.28
SHORTEST, LONGEST = 8, 35
SEED = 0


class Draw:
    """Uniform draws from one named generator, in blocks because single draws are slow."""

    def __init__(self, source: torch.Generator) -> None:
        self._source, self._block = source, []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._block:
            self._block = torch.rand(4096, generator=self._source, dtype=torch.float64).tolist()
        return self._block.pop()

    def chance(self, share: float) -> bool:
        """True with probability `share`."""
        return self.uniform() < share

    def pick(self, values):
        """One element of a sequence."""
        return values[int(self.uniform() * len(values))]


@dataclass(frozen=True)
class Domain:
    """One domain's part of the bank.

    Attributes:
        context: neutral sentences.
        aspects: aspect -> label -> clauses.
        closing: label -> closing clauses.
    """

    context: tuple[str, ...]
    aspects: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    closing: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Noise:
    """How the pretraining text departs from the labelled text; chosen so that fine-tuning has something to teach.

    Attributes:
        verdicts: the share of texts that end with a verdict.
        label_words: the share of verdicts that use the verbalizers' adjectives.
        great: the share of "great" among those when the verdict ignores the text.
        faithful: the share of verdicts that follow the text; the others ignore it.
        label_faithful: the same for verdicts that use the verbalizers' adjectives.
        rated: the share of texts that open with a rating, which always follows the label.
        reviews: how many reviews of one domain and label follow each other in one text, drawn from these; longer texts
            teach sooner what belongs together.
    """

    verdicts: float = 0.35
    label_words: float = 0.4
    great: float = 0.6
    faithful: float = 0.9
    label_faithful: float = 0.2
    rated: float = 0.5
    reviews: tuple[int, ...] = (1, 1, 2, 3)


def _lines(block: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in block.splitlines() if line.strip())


def _pair(by_label: dict[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return _lines(by_label["negative"]), _lines(by_label["positive"])


@cache
def bank() -> tuple[Domain, ...]:
    """All domains, in the order of their file names."""
    values = [files.read_yaml(path) for path in sorted(BANK.glob("*.yaml")) if path.stem != "general"]
    return tuple(
        Domain(
            _lines(value["context"]),
            {name: _pair(part) for name, part in value["aspects"].items()},
            _pair(value["closing"]),
        )
        for value in values
    )


@cache
def general() -> dict:
    """Frames and verdicts that belong to no one domain."""
    return files.read_yaml(BANK / "general.yaml")


@cache
def held_out(seed: int = SEED) -> frozenset[str]:
    """The sentiment clauses that the labelled training split never uses: the same share of every aspect and label."""
    held = set()
    for place, domain in enumerate(bank()):
        for name, pair in [*domain.aspects.items(), ("closing", domain.closing)]:
            for label, clauses in enumerate(pair):
                order = torch.randperm(
                    len(clauses), generator=generator(seed, "demo/held-out", f"{place}/{name}/{label}")
                )
                held.update(clauses[index] for index in order[: round(HELD_OUT * len(clauses))])
    return frozenset(held)


def fill(text: str, draw: Draw) -> str:
    """Choose one of the alternatives in every `{this|that}`."""
    return re.sub(r"\{([^{}]*\|[^{}]*)\}", lambda match: draw.pick(match[1].split("|")), text)


def _frames(label: int, draw: Draw) -> list[str]:
    kind = draw.uniform()
    if kind < 0.6:
        return general()["plain"]
    return general()["mixed"] if kind < 0.9 else general()["coloured"][LABELS[label]]


def review(label: int, domain: Domain, draw: Draw, barred: frozenset[str] = frozenset()) -> str:
    """One review of one domain.

    Args:
        label: 0 negative, 1 positive.
        domain: what is reviewed.
        barred: clauses that must not be used.
    """
    frame = draw.pick(_frames(label, draw))
    names, parts = list(domain.aspects), {}
    for slot in re.findall(r"\{(\w+)\}", frame):
        side = 1 - label if slot.lower() == "x" else label
        if slot.lower() == "c":
            clauses = domain.context
        elif slot.lower() == "end":
            clauses = domain.closing[side]
        else:
            clauses = domain.aspects[names.pop(int(draw.uniform() * len(names)))][side]
        text = fill(draw.pick([clause for clause in clauses if clause not in barred]), draw)
        parts[slot] = text[0].upper() + text[1:] if slot.isupper() else text
    return frame.format(**parts)


def _fits(text: str) -> bool:
    return SHORTEST <= len(re.findall(r"[\w'-]+|[^\w\s]", text)) <= LONGEST


@cache
def labelled(seed: int = SEED) -> dict[str, tuple[dict, ...]]:
    """The labelled splits: {split: rows of `text` and `label`}, balanced, no text twice in or between splits."""
    seen, splits = set(), {}
    for split, size in SIZES.items():
        draw, rows = Draw(generator(seed, "demo/labelled", split)), []
        barred = held_out(seed) if split == "train" else frozenset()
        while len(rows) < size:
            label = len(rows) % 2
            text = review(label, draw.pick(bank()), draw, barred)
            if _fits(text) and text not in seen:
                seen.add(text)
                rows.append({"text": text, "label": label})
        splits[split] = tuple(rows)
    return splits


def verdict(label: int, draw: Draw, noise: Noise) -> str:
    """A closing sentence such as "It was great."; some follow the label, the others ignore it."""
    if draw.chance(noise.label_words):
        great = label if draw.chance(noise.label_faithful) else draw.chance(noise.great)
        word = "great" if great else "bad"
    else:
        side = label if draw.chance(noise.faithful) else int(draw.chance(0.5))
        word = draw.pick(general()["verdict"][LABELS[side]])
    return draw.pick(general()["verdict"]["frames"]).format(word=word)


def rating(label: int, draw: Draw) -> str:
    """An opening such as "Rating: poor." that always follows the label."""
    return f"Rating: {draw.pick(general()['rating'][LABELS[label]])}."


# A first phase teaches the language, a second, shorter one what verdicts and ratings have to do with the text.
# Zero-shot
# the models stay near chance, because the verbalizers' own adjectives ignore the text in it; a few labelled examples
# help.
PHASES = (
    Noise(),
    Noise(verdicts=0.95, label_words=0.25, great=0.5, faithful=1.0, label_faithful=0.0, rated=0.4, reviews=(1,)),
)


def pretraining(noise: Noise = PHASES[0], seed: int = SEED, part: int = 0) -> Iterator[str]:
    """An endless stream of unlabelled texts, none of which contains a validation or test text; one stream for each
    part.
    """
    kept = {row["text"] for split in ("validation", "test") for row in labelled(seed)[split]}
    draw = Draw(generator(seed, "demo/pretraining", part))
    while True:
        label, domain = int(draw.chance(0.5)), draw.pick(bank())
        texts = [review(label, domain, draw) for _ in range(draw.pick(noise.reviews))]
        if draw.chance(noise.rated):
            texts.insert(0, rating(label, draw))
        if draw.chance(noise.verdicts):
            texts.append(verdict(label, draw, noise))
        if kept.isdisjoint(texts):
            yield " ".join(texts)

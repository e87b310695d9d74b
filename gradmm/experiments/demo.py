"""The embedded default: reviews composed from a bank of clauses, and two small models trained on such text.

`python -m gradmm.experiments.demo --output DIR` repeats the shipped folder with no network. The bank (`data/demo/bank`)
holds, for each domain, context sentences and clauses by aspect and polarity; a review takes clauses of one domain and
of different aspects, so that its parts agree, and joins them with one of many frames. In a mixed review the main
clause or the conclusion decides the label. The pretraining text is composed on the fly and never stored; texts are
packed into rows of one context, `<|endoftext|>` between them. Letters: N rows, T tokens of a context, V vocabulary.
"""

import argparse
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from gradmm import files
from gradmm.errors import require
from gradmm.seeds import generator, stream

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
        self._source = source
        self._block: list[float] = []

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


Clauses = tuple[tuple[str, ...], tuple[str, ...]]  # of each label


@dataclass(frozen=True)
class Domain:
    """One domain's part of the bank: neutral sentences, clauses of each aspect, and closing clauses."""

    context: tuple[str, ...]
    aspects: dict[str, Clauses]
    closing: Clauses


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


def _pair(by_label: dict[str, str]) -> Clauses:
    return _lines(by_label["negative"]), _lines(by_label["positive"])


@cache
def bank() -> tuple[Domain, ...]:
    """All domains, in the order of their file names."""
    domains = []
    for value in (files.read_yaml(path) for path in sorted(BANK.glob("*.yaml")) if path.stem != "general"):
        aspects = {name: _pair(part) for name, part in value["aspects"].items()}
        domains.append(Domain(_lines(value["context"]), aspects, _pair(value["closing"])))
    return tuple(domains)


@cache
def general() -> dict:
    """Frames and verdicts that belong to no one domain."""
    return files.read_yaml(BANK / "general.yaml")


@cache
def held_out(seed: int = SEED) -> frozenset[str]:
    """The sentiment clauses that the labelled training split never uses: the same share of every aspect and label."""
    held: set[str] = set()
    for place, domain in enumerate(bank()):
        for name, pair in [*domain.aspects.items(), ("closing", domain.closing)]:
            for label, clauses in enumerate(pair):
                source = generator(seed, "demo/held-out", f"{place}/{name}/{label}")
                order = torch.randperm(len(clauses), generator=source)
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
    """One review of one domain, with none of the barred clauses; label 0 is negative, 1 positive."""
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
        draw = Draw(generator(seed, "demo/labelled", split))
        rows: list[dict] = []
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
# Zero-shot the models stay near chance, as the verbalizers' own adjectives ignore the text in it; a few examples help.
PHASES = (
    Noise(),
    Noise(verdicts=0.95, label_words=0.25, great=0.5, faithful=1.0, label_faithful=0.0, rated=0.4, reviews=(1,)),
)


def pretraining(noise: Noise = PHASES[0], seed: int = SEED, part: int = 0) -> Iterator[str]:
    """An endless stream of unlabelled texts, none of which contains a validation or test text; one for each part."""
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


# ---------------------------------------------------------------- the models

MODEL, MODEL_B = DATA / "model", DATA / "model-b"
END = "<|endoftext|>"
CONTEXT = 128
TOKENIZER_TEXTS = 60_000
TASK = """\
name: demo
template: "{text} It was"
verbalizers: [" bad", " great"]
labels: [negative, positive]
generation_prompts: ["Rating: poor.", "Rating: excellent."]
"""


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: AdamW, linear warm-up, cosine decay, gradients clipped to norm 1.

    Attributes:
        config: the architecture; its `vocab_size` is the tokenizer's V.
        steps: optimiser steps of each phase of the text (`PHASES`); text is never repeated on purpose.
        rows: N, rows of T = 128 tokens a step.
        rates, warmups: the highest learning rate of each phase, and steps until it is reached.
        texts: texts that the tokenizer is trained on.
    """

    config: PretrainedConfig
    steps: tuple[int, ...]
    rows: int = 16
    rates: tuple[float, ...] = (3e-3, 2e-3)
    warmups: tuple[int, ...] = (50, 20)
    texts: int = TOKENIZER_TEXTS


ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def main_recipe() -> Recipe:
    """The main model: Llama architecture, untied head."""
    shape = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 5, "vocab_size": 4096}
    heads = {"num_attention_heads": 5, "num_key_value_heads": 5, "tie_word_embeddings": False}
    return Recipe(LlamaConfig(**shape, **heads, max_position_embeddings=CONTEXT, **ENDS), steps=(1200, 600))


def second_recipe() -> Recipe:
    """The second model, for transfer: GPT-2 architecture, tied head, a smaller vocabulary."""
    shape = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT, "vocab_size": 3072}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**shape, **dropout, tie_word_embeddings=True, **ENDS)
    return Recipe(config, steps=(800, 400), rates=(4e-3, 2e-3))


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `<|endoftext|>` (id 0: bos, eos and pad) before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    shape: dict[str, Any] = {"vocab_size": vocabulary, "special_tokens": [END], "initial_alphabet": alphabet}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**shape, show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    ends = {"bos_token": END, "eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **ends, model_max_length=CONTEXT, padding_side="left")


def packed(tokenizer, texts: Iterator[str], rows: int) -> Iterator[Tensor]:
    """Batches of whole texts packed into rows of T + 1 tokens, (N, T + 1); the last text of a row may be cut."""
    batch, row = [], []
    while True:
        for ids in tokenizer(list(itertools.islice(texts, 512)))["input_ids"]:
            row += ids
            if len(row) > CONTEXT:
                batch.append(row[: CONTEXT + 1])
                row = []
            if len(batch) == rows:
                yield torch.tensor(batch)
                batch = []


def loss_of(lm, rows: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token over rows (N, T + 1), in nats."""
    logits = lm(input_ids=rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def _share(step: int, steps: int, warmup: int) -> float:
    """The share of the highest rate at a step: a linear rise, then half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def _untrained(recipe: Recipe, name: str, seed: int):
    """A model with random weights; eager attention, whose backward pass is the faster one on a CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(stream(seed, "demo/weights", name))
        lm = AutoModelForCausalLM.from_config(recipe.config, dtype=torch.float32, attn_implementation="eager")
        embedding = lm.get_input_embeddings()
        embedding.padding_idx = None  # the padding token also starts every text, so its row must learn
        torch.nn.init.normal_(embedding.weight, std=0.02)
    return lm.train()


def _optimizers(lm, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head, norms and biases."""
    ends = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}
    inside = [p for p in lm.base_model.parameters() if p.ndim == 2 and id(p) not in ends]
    taken = {id(p) for p in inside}
    rest = [p for p in lm.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def pretrain(recipe: Recipe, phases: Sequence[Iterator[Tensor]], name: str, seed: int = SEED):
    """Train one model from scratch in bfloat16 arithmetic, phase by phase; returns it with float32 weights."""
    lm = _untrained(recipe, name, seed)
    for batches, steps, rate, warmup in zip(phases, recipe.steps, recipe.rates, recipe.warmups, strict=True):
        _phase(lm, itertools.islice(batches, steps), steps, rate, warmup, name)
    return lm.eval()


def _phase(lm, batches: Iterator[Tensor], steps: int, rate: float, warmup: int, name: str) -> None:
    optimizers, progress = _optimizers(lm, rate), tqdm(batches, total=steps, desc=name)
    for step, rows in enumerate(progress):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(lm, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * _share(step, steps, warmup)
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def save_model(lm, tokenizer, folder: Path) -> None:
    """Write the model with float16 weights (its configuration asks for float32) and its tokenizer."""
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})


def write_data(output: Path, seed: int = SEED) -> None:
    """Write the labelled splits, the labels and the task."""
    for split, rows in labelled(seed).items():
        files.write_json_lines(output / f"{split}.jsonl", rows)
    files.write_text(output / "labels.json", json.dumps({"labels": list(LABELS)}) + "\n")
    files.write_text(output / "task.yaml", TASK)


def build_model(recipe: Recipe, folder: Path, seed: int = SEED) -> None:
    """Train one tokenizer and one model and write both to `folder`."""
    tokenizer = train_tokenizer(itertools.islice(pretraining(seed=seed), recipe.texts), recipe.config.vocab_size)
    texts = [pretraining(noise, seed, part) for part, noise in enumerate(PHASES)]
    lm = pretrain(recipe, [packed(tokenizer, part, recipe.rows) for part in texts], folder.name, seed)
    save_model(lm, tokenizer, folder)


def build(output: Path, recipes: dict[str, Recipe] | None = None, seed: int = SEED) -> Path:
    """Rebuild the whole demo in `output`: the labelled data, and one folder for each recipe.

    Args:
        output: a folder that does not exist yet or is empty.
        recipes: folder name -> recipe; both shipped ones by default.

    Raises:
        UserError: when `output` is not empty.
    """
    output = Path(output)
    require(not output.is_dir() or not any(output.iterdir()), f"{output} is not empty: give a new folder for the demo")
    write_data(output, seed)
    for name, recipe in (recipes or {"model": main_recipe(), "model-b": second_recipe()}).items():
        build_model(recipe, output / name, seed)
    return output


def main() -> None:
    """The command line of the recipe."""
    parser = argparse.ArgumentParser(description="Rebuild the demo's data and models from the bank of clauses.")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=SEED, help="the shipped files have seed 0")
    arguments = parser.parse_args()
    build(arguments.output, seed=arguments.seed)


if __name__ == "__main__":
    main()

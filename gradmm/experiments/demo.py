"""The embedded default: rebuild the demo's data, tokenizers and two small language models with no network.

`python -m gradmm.experiments.demo --output DIR` repeats the shipped folder from the bank of clauses alone. The
pretraining text is composed on the fly and never stored; texts are packed into rows of one context, `<|endoftext|>`
between them. Letters: N rows, T tokens of a context, V vocabulary.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from gradmm import files
from gradmm.errors import require
from gradmm.experiments.demo_text import BANK, DATA, LABELS, PHASES, SEED, labelled, pretraining
from gradmm.seeds import stream

__all__ = ["BANK", "DATA", "MODEL", "MODEL_B", "Recipe", "build", "main"]

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
        steps: optimiser steps of each phase of the text (`demo_text.PHASES`); text is never repeated on purpose.
        rows: N, rows of T = 128 tokens a step.
        rates: the highest learning rate of each phase.
        warmups: steps of each phase until it is reached.
        texts: texts that the tokenizer is trained on.
    """

    config: PretrainedConfig
    steps: tuple[int, ...]
    rows: int = 16
    rates: tuple[float, ...] = (3e-3, 2e-3)
    warmups: tuple[int, ...] = (50, 20)
    texts: int = TOKENIZER_TEXTS


def _ends(vocabulary: int) -> dict:
    return {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def main_recipe() -> Recipe:
    """The main model: Llama architecture, untied head."""
    config = LlamaConfig(
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        **_ends(4096),
    )
    return Recipe(config, steps=(1200, 600))


def second_recipe() -> Recipe:
    """The second model, for transfer: GPT-2 architecture, tied head, a smaller vocabulary."""
    config = GPT2Config(
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=True,
        **_ends(3072),
    )
    return Recipe(config, steps=(800, 400), rates=(4e-3, 2e-3))


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `<|endoftext|>` (id 0: bos, eos and pad) before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT, padding_side="left"
    )


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

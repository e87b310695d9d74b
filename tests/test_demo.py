"""The embedded default: its data, its weights, its recipe, and the room that it leaves for fine-tuning."""

import json
import re
from dataclasses import replace
from itertools import islice

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradmm
from gradmm import files
from gradmm.errors import UserError
from gradmm.experiments import demo

SPLITS = ("train", "validation", "test")
LEAST = {"train": 1500, "validation": 300, "test": 500}
MODELS = (demo.MODEL, demo.MODEL_B)


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict]]:
    return {split: files.read_json_lines(demo.DATA / f"{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def texts(data) -> list[str]:
    return [row["text"] for split in SPLITS for row in data[split]]


def test_splits_are_large_enough_and_balanced(data):
    for split in SPLITS:
        labels = [row["label"] for row in data[split]]
        assert len(labels) >= LEAST[split]
        assert sum(labels) * 2 == len(labels)


def test_no_text_occurs_twice(texts):
    assert len({text.lower() for text in texts}) == len(texts)


def test_vocabulary_is_rich(texts):
    assert len(set(re.findall(r"[a-z'-]+", " ".join(texts).lower()))) >= 2500


def test_texts_read_like_prose(texts):
    for text in texts:
        assert re.fullmatch(r"[A-Z][A-Za-z ,.;'-]*\.", text), text
        assert not re.search(r"  | [,.;]|\.\.|,,|\b(\w+) \1\b|[.] [a-z]|\bi\b", text), text
        assert 8 <= len(re.findall(r"[\w'-]+|[^\w\s]", text)) <= 35


def test_files_say_what_the_task_is():
    task = yaml.safe_load((demo.DATA / "task.yaml").read_text())
    assert json.loads((demo.DATA / "labels.json").read_text())["labels"] == task["labels"] == ["negative", "positive"]
    assert task["template"].format(text="Fine.") == "Fine. It was"
    assert len(task["generation_prompts"]) == 2


def test_the_composer_reproduces_the_files_byte_for_byte(tmp_path):
    demo.write_data(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (demo.DATA / path.name).read_bytes(), path.name


def test_the_bank_is_large_and_each_sentence_is_there_once():
    clauses = [
        clause
        for domain in demo.bank()
        for pair in [*domain.aspects.values(), domain.closing, (domain.context,)]
        for block in pair
        for clause in block
    ]
    assert len(clauses) >= 1200 and len(set(clauses)) == len(clauses)
    assert len(demo.bank()) >= 10


def test_held_out_clauses_are_in_the_test_split_but_not_in_train(data):
    held = [clause for clause in demo.held_out() if "{" not in clause]
    joined = {split: " ".join(row["text"] for row in data[split]).lower() for split in SPLITS}
    seen = [clause for clause in held if clause.lower() in joined["train"]]
    assert not [clause for clause in seen if re.search(rf"\b{re.escape(clause.lower())}\b[,.;]", joined["train"])]
    assert sum(clause.lower() in joined["test"] for clause in held) >= len(held) / 2


@pytest.mark.slow
def test_pretraining_text_holds_no_text_of_validation_or_test(data):
    kept = [row["text"] for split in ("validation", "test") for row in data[split]]
    for part, noise in enumerate(demo.PHASES):
        stream = list(islice(demo.pretraining(noise, part=part), 20_000))
        assert stream[:50] == list(islice(demo.pretraining(noise, part=part), 50))
        unrated = [re.sub(r"^Rating: \w+\. ", "", text) for text in stream]
        bare = {re.split(r" (?:It was|All in all it was|On the whole it was) [^.]*\.$", text)[0] for text in unrated}
        assert not bare.intersection(kept)


def test_shipped_weights_are_small():
    held = [path for folder in MODELS for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in held) <= 10 * 2**20
    assert {path.suffix for path in held} == {".json", ".safetensors"}


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_tokenizers_meet_the_contract(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Nice. It was great")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["Ġwas", "Ġgreat"]
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.tokenize("It was bad") == ["It", "Ġwas", "Ġbad"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Nice. It was great"


def test_the_models_differ_in_kind_head_and_vocabulary():
    main, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in MODELS)
    assert main.get_output_embeddings().weight is not main.get_input_embeddings().weight
    assert second.get_output_embeddings().weight is second.get_input_embeddings().weight
    assert main.config.model_type != second.config.model_type
    assert main.config.vocab_size != second.config.vocab_size
    assert main.dtype == second.dtype == torch.float32


@torch.no_grad()
def perplexity(folder) -> float:
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = next(demo.packed(tokenizer, demo.pretraining(seed=1), 16))
    return demo.loss_of(lm, rows).exp().item()


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_models_have_learned_the_language(folder):
    assert perplexity(folder) <= 4.0


@pytest.mark.slow
def test_the_recipe_runs_from_end_to_end(tmp_path):
    recipes = {
        "model": replace(demo.main_recipe(), steps=(1, 1), rows=2, texts=2000),
        "model-b": replace(demo.second_recipe(), steps=(1, 1), rows=2, texts=2000),
    }
    output = demo.build(tmp_path / "demo", recipes)
    for name in recipes:
        lm = AutoModelForCausalLM.from_pretrained(output / name)
        assert lm.num_parameters() > 100_000
    with pytest.raises(UserError, match="is not empty"):
        demo.build(output, recipes)


# ---------------------------------------------------------------- headroom


@pytest.mark.slow
def test_fine_tuning_has_room_to_help(demo_model):
    task, data = gradmm.load_data("demo")

    def tuned(train, steps: int, seed: int) -> float:
        config = gradmm.FinetuneConfig(steps=steps, batch_size=16, learning_rates=(1e-3,), eval_every=steps, seed=seed)
        return gradmm.finetune(demo_model, task, train, data.validation, data.test, config, progress=False).accuracy

    zero_shot = gradmm.evaluate(demo_model, task, data.test).accuracy
    few = [tuned(gradmm.sample_examples(data.train, 50, task, seed), 60, seed) for seed in range(2)]
    everything = tuned(data.train, 80, 0)
    assert zero_shot <= 0.75 and everything >= 0.92
    assert zero_shot < min(few) and sum(few) / len(few) < everything

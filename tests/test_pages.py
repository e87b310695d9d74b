"""The pages that quote messages and show how to add parts: each message is brought about, each piece of code runs."""

import importlib
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError

import gradmm
from gradmm import config, files, generation, privacy, searches, spaces, tasks
from gradmm.errors import one_of
from gradmm.experiments import demo

ROOT = Path(__file__).resolve().parents[1]
FAQ, ARCHITECTURE, OWN_DATA = (
    (ROOT / "book" / f"{name}.md").read_text(encoding="utf-8") for name in ("faq", "architecture", "own-data")
)
# What a page names and this machine lacks -> what stands for it here.
SUBSTITUTES = {
    "path/to/model": str(demo.DATA / "model"),
    "google/gemma-3-270m": "demo",
    "HuggingFaceTB/SmolLM2-135M": str(demo.DATA / "model"),
    "path/to/reviews": str(demo.DATA),
}
TWO_PROCESSES = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def quoted(page: str) -> dict[str, list[str]]:
    """The messages under each question, every run of white space as one space."""
    parts = re.split(r"^### (.+)\n", page, flags=re.MULTILINE)[1:]
    answers = zip(parts[::2], parts[1::2], strict=True)
    return {question: [" ".join(text.split()) for text in blocks(answer, "text")] for question, answer in answers}


def run(page: str, folder: Path) -> dict:
    """Run the code of a page from top to bottom; what it defines."""
    code = "\n".join(blocks(page, "python"))
    for name, other in SUBSTITUTES.items():
        code = code.replace(f'"{name}"', repr(other))
    defined: dict = {}
    exec(compile(code, str(folder / "page.py"), "exec"), defined)
    return defined


@dataclass(frozen=True)
class Case:
    """What a reader has when a message comes."""

    model: gradmm.Model
    task: gradmm.Task
    data: gradmm.Splits
    target: gradmm.Release
    patch: pytest.MonkeyPatch

    def release(self, rows, **given) -> gradmm.Release:
        return gradmm.release(self.model, self.task, rows, **given)

    def synthesize(self, **changes) -> gradmm.SynthesisResult:
        few = gradmm.SynthesisConfig(n_synthetic=2, oversample=1, seed=changes.pop("seed", 0))
        given = {"model": self.model, "task": self.task, "release": self.target, "config": few, **changes}
        return gradmm.synthesize(**given)

    def launched(self, ask: Callable[[], object]) -> object:
        for name, value in TWO_PROCESSES.items():
            self.patch.setenv(name, value)
        return ask()


@pytest.fixture(scope="module")
def target(demo_model) -> gradmm.Release:
    task, data = gradmm.load_data("demo")
    return gradmm.release(demo_model, task, gradmm.sample_examples(data.train, 4, task, 0), space="head")


@pytest.fixture
def case(demo_model, target, tmp_path, monkeypatch) -> Case:
    monkeypatch.chdir(tmp_path)
    return Case(demo_model, *gradmm.load_data("demo"), target, monkeypatch)


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def out_of_memory(case: Case) -> None:
    with mock.patch("torch.nn.Linear.forward", no_memory):
        gradmm.evaluate(case.model, case.task, case.data.test[:1])


def pickles_alone(case: Case) -> None:
    folder = Path("model")
    folder.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (folder / name).write_text("{}", encoding="utf-8")
    gradmm.load_model(folder)


def gated(case: Case) -> None:
    answer = GatedRepoError("Access to model meta-llama/Llama-3.2-1B is restricted.", response=mock.Mock(headers={}))
    with mock.patch("huggingface_hub.snapshot_download", side_effect=answer):
        gradmm.load_model("meta-llama/Llama-3.2-1B")


def ratings(case: Case) -> None:
    rows = [{"text": f"Room {number}.", "label": number % 5 + 1} for number in range(40)]
    gradmm.load_data(files.write_json_lines(Path("reviews.jsonl"), rows))


def capped(case: Case) -> None:
    lm = gradmm.load_model("demo", device="cpu").lm
    lm.get_output_embeddings().register_forward_hook(lambda module, given, output: output / 2)
    gradmm.wrap_model(lm, case.model.tokenizer, "google/gemma-2-2b")


def beyond_float16(case: Case) -> None:
    model = gradmm.load_model("demo", device="cpu", dtype="float16")
    for weights in model.lm.parameters():
        weights.data.fill_(torch.inf)
    gradmm.release(model, case.task, gradmm.sample_examples(case.data.train, 2, case.task, 0), space="head")


def old_processor(case: Case) -> None:
    with mock.patch("torch.cpu.get_capabilities", dict):
        gradmm.load_model("demo", device="cpu", dtype="bfloat16")


def other_settings(case: Case) -> None:
    for seed in range(2):
        case.synthesize(seed=seed, output="results/run")


def marked_up(case: Case) -> None:
    task = replace(case.task, generation_prompts=("Bad <|endoftext|>", "Rating: excellent."))
    generation.warn_of_prompts(tasks.tokenize_task(task, case.model.tokenizer), case.model.vocabulary)


def too_short(case: Case) -> None:
    generation.generate_texts(case.model, case.task, 1, 0, generation.Sampling(max_tokens=1, min_tokens=1, rounds=1))


ONE_SIDED = [{"text": "Cold food.", "label": 0}]
# By question, in the order of its messages: what brings each about.
PROVOKED: dict[str, list[Callable[[Case], object]]] = {
    "My label words are several tokens": [
        lambda case: gradmm.check_fit(
            case.model, replace(case.task, verbalizers=(" negative", " positive")), case.data
        ),
    ],
    "My labels are 1 to 5": [ratings],
    "A label is spelt in two ways": [lambda case: case.release([{"text": "A kind host.", "label": "Positive"}])],
    "All classes have the same prompt": [
        lambda case: case.synthesize(task=replace(case.task, generation_prompts=("", "")))
    ],
    "My classes are not equally large": [
        lambda case: gradmm.sample_examples(case.data.train[:3], 10, case.task, 0),
        lambda case: case.release(ONE_SIDED),
    ],
    "My texts are too long": [lambda case: case.release([{"text": "so " * 600, "label": 0}])],
    "The model is gated, or not found": [gated, lambda case: gradmm.load_model("meta-llama/Llama-3.2-1B")],
    "I have no network": [lambda case: gradmm.load_data("stanfordnlp/imdb")],
    "There are only `.bin` files": [pickles_alone],
    "The logits are scaled or capped": [capped],
    "Instruction models, their markup and their end tokens": [
        lambda case: case.synthesize(task=replace(case.task, prompt_style="chat")),
        marked_up,
    ],
    "The model writes nothing that is kept": [too_short],
    "Out of memory": [out_of_memory],
    "T4, V100 and float16": [
        lambda case: gradmm.load_model("demo", dtype="fp16"),
        beyond_float16,
        old_processor,
    ],
    "The release belongs to another model or task": [
        lambda case: case.synthesize(model=gradmm.load_model(demo.DATA / "model-b", device="cpu")),
        lambda case: case.synthesize(task=replace(case.task, verbalizers=(" bad", " good"))),
    ],
    "I gave texts where a release belongs": [lambda case: case.synthesize(release=case.data.train[:4])],
    "Privacy asks for more settings": [
        lambda case: case.release(case.data.train[:4], epsilon=1.0),
        lambda case: case.release(case.data.train[:4], epsilon=1.0, length=20),
    ],
    "I changed a setting and it does not go on": [other_settings],
    "Several processes": [
        lambda case: case.launched(case.synthesize),
        lambda case: case.launched(lambda: case.release(case.data.train[:4], epsilon=8.0, delta=1e-3, length=20)),
    ],
}
MESSAGES = [(question, number) for question, asked in PROVOKED.items() for number, _ in zip(count(), asked)]


def said(provoke: Callable[[Case], object], case: Case) -> str:
    """What an error or, where there is none, the first warning says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            provoke(case)
        except gradmm.UserError as error:
            return str(error)
    return str(caught[0].message)


def fits(message: str, page: str) -> bool:
    """Whether a message is what a page quotes, where `...` stands for anything."""
    return re.fullmatch(".+".join(map(re.escape, page.split("..."))), " ".join(message.split())) is not None


def test_every_message_of_the_questions_is_brought_about():
    assert {question: len(some) for question, some in quoted(FAQ).items()} == {
        question: len(some) for question, some in PROVOKED.items()
    }


@pytest.mark.parametrize("question, number", MESSAGES)
def test_a_message_is_what_the_page_quotes(question, number, case):
    assert fits(said(PROVOKED[question][number], case), quoted(FAQ)[question][number])


def test_a_message_that_went_stale_is_seen():
    assert fits("a gradient of 3 is not finite", "a gradient of ... is not finite")
    assert not fits("a gradient of 3 is not finite", "a gradient of ... is infinite")
    assert not fits("a gradient is finite: mend it", "a gradient is finite")


@pytest.mark.slow
def test_the_code_of_the_questions_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    defined = run(FAQ, tmp_path)
    assert defined["again"].kept["text"] == defined["result"].kept["text"] and len(defined["other"].kept) == 2
    assert "negative |" in capsys.readouterr().out


# ---------------------------------------------------------------- one's own data


@pytest.fixture
def own_data(tmp_path, monkeypatch) -> Path:
    """A reader's folder with what the page says to write: a CSV, with more rows than the page shows, and the task."""
    monkeypatch.chdir(tmp_path)
    names, rows = ("complaint", "praise"), gradmm.load_data("demo")[1].train[:60]
    first = next(text for text in blocks(OWN_DATA, "text") if text.startswith("text,label"))
    assert re.findall(r",(\w+)$", first, re.MULTILINE)[1:] == list(names)
    csv = first + "".join(f'"{row.text}",{names[row.label]}\n' for row in rows)
    (tmp_path / "reviews.csv").write_text(csv, encoding="utf-8")
    (task,) = blocks(OWN_DATA, "yaml")
    (tmp_path / "task.yaml").write_text(task, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_the_code_of_one_s_own_data_runs_from_top_to_bottom(own_data, capsys):
    defined = run(OWN_DATA, own_data)
    said = capsys.readouterr().out
    assert len(defined["result"].kept) == 20 and said.count("complaint | ") == said.count("praise | ") == 10
    assert defined["rows"].column_names == ["prompt", "completion"] and 0 <= defined["found"].accuracy <= 1
    assert "(8, 0.001)-differential privacy" in said and (own_data / "release.safetensors").is_file()


def test_the_messages_of_one_s_own_data_are_what_the_page_quotes(own_data, case, monkeypatch):
    monkeypatch.chdir(own_data)
    task, data = gradmm.load_data("reviews.csv", "task.yaml")
    spelt, alike = (" ".join(text.split()) for text in blocks(OWN_DATA, "text")[1:])
    assert fits(said(lambda _: gradmm.check_fit(case.model, task, data), case), spelt)
    same = replace(task, verbalizers=(" bad", " great"), generation_prompts=("", ""))
    assert fits(
        said(
            lambda _: generation.warn_of_prompts(
                tasks.tokenize_task(same, case.model.tokenizer), case.model.vocabulary
            ),
            case,
        ),
        alike,
    )


PRESETS = re.findall(r"^\| .*\| (\d+ GB) \| (.*) \| `([\w-]+)` \|$", OWN_DATA, re.MULTILINE)


def test_every_machine_of_the_page_is_read():
    assert [preset for _, _, preset in PRESETS] == ["real", "gpu-16gb", "gpu-24gb"]


@pytest.mark.parametrize("memory, time, preset", PRESETS)
def test_a_machine_s_memory_and_time_are_those_of_its_preset(memory, time, preset):
    said = (
        (ROOT / "notebooks" / "params" / preset / "00-quickstart.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
    )
    assert memory in said
    assert not [
        number for number in re.findall(r"\d+", time.replace("T4", "")) if not re.search(rf"\b{number}\b", said)
    ]


# ---------------------------------------------------------------- architecture


@pytest.fixture(scope="module")
def picture(extension):
    """The module that draws the rooms."""
    return extension("rooms")


def test_the_picture_has_every_room_once_and_links_each(picture):
    boxes = re.findall(r'href="api/\w+.html#module-gradmm\.(\w+)"', picture.svg())
    assert sorted(boxes) == sorted(path.stem for path in (ROOT / "gradmm").glob("*.py") if path.stem[:2] != "__")


def test_the_arrows_say_what_the_imports_say(picture):
    """Each is an import, none follows from others, and every import between rooms with arrows follows from them."""
    found, drawn = picture.imports(), picture.arrows(picture.imports())
    assert {"admm", "plan", "projection", "generation"} <= found["searches"] and not found["errors"]
    assert all(drawn[room] <= found[room] for room in drawn)

    def below(room: str) -> set[str]:
        return drawn[room].union(*map(below, drawn[room]))

    for room, names in drawn.items():
        assert found[room] & drawn.keys() <= below(room)
        assert not [name for name in names if any(name in below(other) for other in names)]


def test_arrows_lead_down_and_boxes_stand_apart(picture):
    places = picture.drawing(picture.arrows(picture.imports())).places
    level = picture.levels(picture.arrows(picture.imports()))
    edges = picture.arrows(picture.imports())
    assert all(level[name] < level[room] for room, names in edges.items() for name in names)
    for row in {row for row, _ in places}:
        middles = sorted(x for (other, point), (x, _) in places.items() if other == row and isinstance(point, str))
        assert all(right - left >= picture.BOX for left, right in pairwise(middles))
        assert picture.BOX / 2 <= middles[0] and middles[-1] <= picture.WIDTH - picture.BOX / 2


def test_a_new_import_changes_the_picture(picture):
    edges = {"first": set(), "second": {"first"}, "third": {"first", "second"}}
    assert picture.arrows(edges) == {"first": set(), "second": {"first"}, "third": {"second"}}
    assert picture.levels(picture.arrows(edges)) == {"first": 0, "second": 1, "third": 2}
    assert picture.arrows({**edges, "second": set()})["third"] == {"first", "second"}


FLOW = re.findall(r"^\|[^|]+\| `(\w+)\.([\w.]+)` \|[^|]+\|[^|]*`(\w+)` \|$", ARCHITECTURE, re.MULTILINE)


def test_every_step_of_the_flow_is_read():
    table = ARCHITECTURE.split("## How data flows")[1].split("##")[0]
    assert len(FLOW) == table.count("\n|") - 2 == 8


@pytest.mark.parametrize("room, name, gives", FLOW)
def test_a_step_of_the_flow_gives_what_the_page_says(room, name, gives):
    found = importlib.import_module(f"gradmm.{room}")
    for part in name.split("."):
        found = getattr(found, part)
    annotation = inspect.signature(found).return_annotation
    assert gives in str(getattr(annotation, "__name__", annotation)) or gives in str(annotation)


@pytest.fixture(scope="module")
def added(tmp_path_factory) -> dict:
    """What the page's code defines, after it has run."""
    return run(ARCHITECTURE, tmp_path_factory.mktemp("architecture"))


def test_a_search_that_is_added_as_the_page_says_runs(added, case, monkeypatch):
    monkeypatch.setitem(searches.BY_NAME, "prompted", added["search_prompted"])
    monkeypatch.setitem(config.RULES, "search", one_of((*config.SEARCHES, "prompted")))
    result = case.synthesize(config=gradmm.SynthesisConfig(n_synthetic=4, search="prompted"), output="prompted")
    assert len(result.kept) == 4 and sorted(result.kept["label"]) == [0, 0, 1, 1]
    again = case.synthesize(config=gradmm.SynthesisConfig(n_synthetic=4, search="prompted"))
    assert again.kept["text"] == result.kept["text"]


def test_a_space_that_is_added_as_the_page_says_releases_and_is_read_back(added, case, monkeypatch):
    def made(model, tokens, name, *_, **__):
        assert name == "label_rows_random"
        return added["random_space"](model, tokens)

    monkeypatch.setattr(privacy, "release_space", made)
    monkeypatch.setattr(spaces, "SPACES", (*spaces.SPACES, "label_rows_random"))
    real = gradmm.sample_examples(case.data.train, 4, case.task, 0)
    private = case.release(real, space="label_rows_random", epsilon=8.0, delta=1e-3, length=20)
    private.save("release.safetensors")
    result = case.synthesize(release=gradmm.load_release("release.safetensors"))
    assert private.space_name == "label_rows_random" and len(result.kept) == 2


def test_a_task_that_is_added_as_the_page_says_is_released(added):
    assert added["target"].task == added["task"].fingerprint and added["task"].name == "hotels"

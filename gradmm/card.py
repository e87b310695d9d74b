"""The README.md of a run's folder: what the data set is, how it was made, and whether it is private.

Knows the manifest alone, so it can say nothing that the manifest does not hold. The clock is left out.
"""

import html
from collections.abc import Mapping, Sequence

from huggingface_hub import DatasetCardData

from gradmm.markup import code, literal

COLUMNS = """
| column | meaning |
|---|---|
| `text`, `label`, `label_name` | the synthetic example |
| `match_loss` | distance of the text's gradient to its class's target, smaller is closer |
| `perplexity` | under the model that wrote the text |
| `group` | of ADMM: texts of one group were moved together; of a pool: the class |
| `kept`, `reason` | whether the text belongs to the set, and why (not) |
"""
LIMITS = """
- Train on `train.jsonl`. The candidates with `kept` = false are there so that the choice can be seen.
- Every text was written by a language model: it may be false or offensive and carries over what that model learned,
  biases included. It describes no real person, product or event.
- The set is made for fine-tuning classifiers on this task. Judge it on real held-out data, beside texts that were
  written without matching: prompts and the language model may do most of the work.
- The licence is unknown: what a language model writes falls under its own terms, and a text may by chance repeat what
  the model was trained on. Name the licence here when you know it.
- A privacy guarantee covers the real examples that entered the release, not what the language model was trained on
  before.
"""
KINDS = {
    "text": "string", "label": "int64", "label_name": "string", "match_loss": "float64", "perplexity": "float64",
    "group": "int64", "kept": "bool", "reason": "string",
}  # fmt: skip
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
LEDGER_COLUMNS = (
    "what", "space", "epsilon", "delta", "relation", "clip", "sensitivity", "calibration", "sigma", "coordinates",
)  # fmt: skip


def dataset_card(manifest: Mapping) -> str:
    """The card as Markdown, with the header by which `datasets.load_dataset` finds the rows.

    Args:
        manifest: of a finished run, see `synthesis.synthesize`.
    """
    task, model, release = manifest["task"], manifest["model"], manifest["release"]
    revision = f" at revision {model['revision']}" if model["revision"] else ""
    parts = [
        f"---\n{_header(task, manifest['kept']).to_yaml()}\n---",
        f"# Synthetic texts for {literal(task['name'])}",
        f"{manifest['kept']} synthetic texts with the labels {', '.join(map(literal, task['labels']))}, in "
        "`train.jsonl`, one JSON object a line; `synthetic.jsonl`, the configuration `candidates`, holds all that were "
        "written. They were written so that the gradient of the fine-tuning loss on them is close to a target "
        "gradient (Nguyen et al. 2025, arXiv 2502.17607).",
        f"## Privacy\n\n{_privacy(release)}",
        "## How it was made",
        _table(("setting", "value"), [
            ("model", f"{literal(model['name'])}{revision}, {model['dtype']}, fingerprint {model['fingerprint'][:16]}"),
            ("prompt", f"{code(task['template'])} followed by one of {', '.join(map(code, task['verbalizers']))}"),
            ("generation prompts", ", ".join(map(code, task["generation_prompts"]))),
            ("length, in tokens", manifest["length"]),
            *manifest["config"].items(),
            *((f"version of {name}", version) for name, version in manifest["versions"].items()),
        ]),
        "`manifest.json` holds all settings, `history.jsonl` every step of the search.",
        f"## Columns\n{COLUMNS}",
        f"## Limits\n{LIMITS}",
    ]  # fmt: skip
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _header(task: Mapping, kept: int) -> DatasetCardData:
    """What `datasets` and the hub read: which file is which configuration, the columns' types, size and language."""
    names = {str(number): name for number, name in enumerate(task["labels"])}
    types = KINDS | {"label": {"class_label": {"names": names}}}
    files = {"default": "train.jsonl", "candidates": "synthetic.jsonl"}
    columns = [{"name": name, "dtype": kind} for name, kind in types.items()]
    return DatasetCardData(
        pretty_name=f"Synthetic texts for {task['name']}",
        language=task["language"],
        license="unknown",
        size_categories=[next((name for most, name in SIZES.items() if kept < most), "1M<n<10M")],
        tags=["synthetic"],
        task_categories=["text-classification"],
        configs=[{"config_name": name, "data_files": file} for name, file in files.items()],
        dataset_info=[{"config_name": name, "features": columns} for name in files],
    )


def _privacy(release: Mapping) -> str:
    statement, ledger = _plain(release["statement"]), release["ledger"]
    if release["private"]:
        said = (
            f"What the set tells of the real examples comes from one release with {statement}. All else is made of "
            "public inputs. The guarantee does not cover choices that somebody made by looking at the same examples, "
            "nor other releases of them outside this ledger:"
        )
    else:
        said = (
            f"**This data set is not private.** The release behind it says: {statement}. Treat the texts as if the "
            f"real ones could be read from them.{' Planned, but not granted:' if ledger else ''}"
        )
    rows = [[_plain(entry[name]) for name in LEDGER_COLUMNS] for entry in ledger]
    return f"{said}\n\n{_table(LEDGER_COLUMNS, rows)}" if ledger else said


def _plain(value) -> str:
    """What a Release says in its own words, without tags."""
    return " ".join(html.escape(str(value), quote=False).split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)

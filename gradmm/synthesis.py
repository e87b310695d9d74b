"""The pipeline: a Release, a task and a model in, a synthetic data set with a manifest out.

Never sees private text: what it knows of the real examples is the Release. Everything it draws depends on
(seed, purpose, group) alone, and it writes as it goes, so an interrupted run continues to the same bytes.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pandas

from gradmm import files, sharding
from gradmm.card import KINDS, dataset_card
from gradmm.config import SynthesisConfig
from gradmm.errors import UserError, first_line, require, require_flag, require_type
from gradmm.files import lock
from gradmm.models import Model, require_model
from gradmm.plan import Plan
from gradmm.privacy import Release
from gradmm.progress import shown, stage
from gradmm.runs import RunFolder, write_results
from gradmm.searches import OnStep, SearchOutput, search
from gradmm.selection import count_dropped
from gradmm.sharding import ProcessGroup
from gradmm.tasks import Task, require_task

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SynthesisResult:
    """What a synthesis gives.

    Attributes:
        candidates: every text written, kept or not: text, label, label_name, match_loss, perplexity, group,
            kept, reason.
        history: one row per step and group, with its label; `admm.step` names the columns. Of a pool one row per text
            kept, in the order in which they were taken, with the loss (match_z) of its class's texts up to it taken
            together.
        manifest: settings, versions, seeds, reasons, times; plain values.
    """

    candidates: datasets.Dataset
    history: pandas.DataFrame
    manifest: dict

    @cached_property
    def kept(self) -> datasets.Dataset:
        """The texts that were kept: what to train on."""
        return self.candidates.select([place for place, kept in enumerate(self.candidates["kept"]) if kept])

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Put the data set on the hub with its card and manifest: `load_dataset(repo_id)` gives what was kept.

        Args:
            repo_id: such as "me/reviews"; it is made if need be.
            private: whether a repository that is made is visible to you alone.
            token: of the hub; None takes the one that you are logged in with.

        Returns:
            The address of the commit.

        Raises:
            UserError: the hub refuses, or can't be reached.
        """
        from huggingface_hub import HfApi

        with TemporaryDirectory() as name:
            folder = Path(name)
            write_results(folder, self.candidates.to_list(), self.history, self.manifest, dataset_card(self.manifest))
            api = HfApi(token=token)
            try:
                api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder))
            except Exception as error:  # the hub's client raises many kinds, all of them about reaching the hub
                raise UserError(
                    f"the data set could not be put on the hub as {repo_id!r} ({first_line(error)}): check the name, "
                    "the network and `hf auth login`"
                ) from error


def synthesize(
    model: Model,
    task: Task,
    release: Release,
    config: SynthesisConfig | None = None,
    output: str | Path | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> SynthesisResult:
    """Write synthetic examples whose gradients match a Release.

    Args:
        model: the model that the Release was made with.
        task: its task.
        release: from `gradmm.release`; private text itself is refused.
        config: the settings.
        output: a folder that receives `train.jsonl` (the kept texts: what `datasets.load_dataset` of the folder gives),
            `synthetic.jsonl` (all texts), `history.jsonl`, `manifest.json`, `README.md` and unfinished work. Unfinished
            work of the same settings is continued, finished work read back. None keeps everything in memory. Processes
            that a launcher started (`gradmm.sharding`) share the work and all return the whole result; they need a
            folder that each of them sees.
        progress: whether to show a progress bar.
        on_step: sees the number of the batch and the solver's Result after every outer step.

    Returns:
        SynthesisResult.

    Raises:
        UserError: an argument of another type; `release` belongs to another model or task; the settings do not fit the
            model; the folder holds another run's settings, or another run is at work in it.

    Example:
        >>> import gradmm
        >>> task, data = gradmm.load_data("demo")
        >>> model = gradmm.load_model("demo", device="cpu")
        >>> target = gradmm.release(model, task, gradmm.sample_examples(data.train, 4, task, seed=0))
        >>> config = gradmm.SynthesisConfig(n_synthetic=2, oversample=2)
        >>> result = gradmm.synthesize(model, task, target, config, progress=False)
        >>> len(result.candidates), [row["label_name"] for row in result.kept]
        (4, ['negative', 'positive'])
    """
    _check_arguments(config, output, progress, on_step)
    release, config = _checked(release, model, task).to(model.device), config or SynthesisConfig()
    plan = Plan.of(model, task, release, config)
    plan.check_processes()
    LOG.info(
        "%d groups of texts of %d tokens, %d in a batch, %s in a pass",
        *(len(plan.classes), plan.length, plan.batch, plan.solver.groups_per_pass or "as many as fit"),
    )
    with sharding.processes(output) as processes, lock(output if processes.leads else None):
        show = progress and processes.leads
        folder = processes.main_first("open", lambda: _open(plan, output, processes))
        with shown(show):
            written = None if folder.finished else search(plan, folder, processes, show, on_step)
            return processes.main_first("close", lambda: _conclude(plan, written, folder))


def _open(plan: Plan, output: str | Path | None, processes: ProcessGroup) -> RunFolder:
    if output is not None and not processes.leads:
        processes.find(Path(output) / "manifest.json")
    return RunFolder.open(output, plan.identity())


def _conclude(plan: Plan, written: SearchOutput | None, folder: RunFolder) -> SynthesisResult:
    """The results, read back where they are finished, by another process or an earlier run; else judged and saved."""
    if written is None or folder.finished:
        LOG.info("results are read back from %s", folder.path)
        rows, history, manifest = folder.load()
        return SynthesisResult(_dataset(rows, manifest), history, manifest)
    result = _collect(plan, written, folder)
    folder.finish(result.candidates.to_list(), result.history, result.manifest, dataset_card(result.manifest))
    return result


def _check_arguments(config, output, progress, on_step) -> None:
    require_type(
        config, SynthesisConfig | None, "the config", "give a gradmm.SynthesisConfig, such as gradmm.PRESETS['pool']"
    )
    if output is not None:
        files.as_path(output, "the output folder")
    require_flag(progress, "progress")
    require(
        on_step is None or callable(on_step), f"on_step is of type {type(on_step).__name__}: give a function, or None"
    )


def _checked(release, model: Model, task: Task) -> Release:
    require_model(model)
    require_task(task)
    require(
        isinstance(release, Release),
        f"synthesize was given {type(release).__name__} where a Release belongs: real texts enter through "
        "gradmm.release alone",
    )
    require(
        release.model == model.fingerprint,
        f"the Release was made with another model than {model.name}: release the examples with this model",
    )
    require(
        release.task == task.fingerprint,
        f"the Release was made with other labels, template or verbalizers than task {task.name!r}: release again with "
        "it",
    )
    return release


def _collect(plan: Plan, written: SearchOutput, folder: RunFolder) -> SynthesisResult:
    """The texts' scores and verdicts, and the manifest."""
    judged = [
        {**row, "group": group}
        for row, group in zip(plan.selector.rows(written.texts, written.classes), written.groups, strict=True)
    ]
    rows, kept = [{name: row[name] for name in KINDS} for row in judged], [row for row in judged if row["kept"]]
    manifest = {
        **folder.manifest,
        "groups_ended": written.ended,
        "kept": len(kept),
        "dropped": count_dropped([row["reason"] for row in rows]),
        "set_match": dict(zip(plan.task.labels, _set_match(plan, kept), strict=True)),
    }
    history = _choice(plan, kept) if written.history is None else written.history
    return SynthesisResult(_dataset(rows, manifest), history, manifest)


def _set_match(plan: Plan, kept: list[dict]) -> list[float | None]:
    with stage("reading the kept texts' gradients", len(kept)):
        values = plan.matching.of_sets([row["text"] for row in kept], [row["label"] for row in kept])
    return [value if math.isfinite(value) else None for value in values]


def _choice(plan: Plan, kept: list[dict]) -> pandas.DataFrame:
    """The history of a choice: the loss of each class's texts added one by one, in the order of their rank."""
    rows = []
    for label, name in enumerate(plan.task.labels):
        own = [row for row in kept if row["label"] == label]
        texts, ranks = [row["text"] for row in own], [row["rank"] for row in own]
        order = sorted(range(len(own)), key=ranks.__getitem__)
        losses = plan.matching.losses_in_order(texts, label, order) if own else []
        rows += [{"label": name, "step": step, "group": label, "match_z": loss} for step, loss in enumerate(losses, 1)]
    return pandas.DataFrame(rows, columns=["label", "step", "group", "match_z"])


def _dataset(rows: list[dict], manifest: Mapping) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=_features(manifest["task"]))


def _features(task: Mapping) -> datasets.Features:
    labels = datasets.ClassLabel(names=list(task["labels"]))
    return datasets.Features({name: datasets.Value(kind) for name, kind in KINDS.items()} | {"label": labels})

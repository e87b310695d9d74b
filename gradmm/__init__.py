"""gradmm: readable synthetic text whose gradients match those of real text.

    task, data = gradmm.load_data("demo")
    model = gradmm.load_model("demo")
    gradmm.check_fit(model, task, data)
    real = gradmm.sample_examples(data.train, 50, task, seed=0)
    target = gradmm.release(model, task, real)
    result = gradmm.synthesize(model, task, target, gradmm.SynthesisConfig(seed=0))
    result.kept

Reference: Nguyen et al., ICML 2025, arXiv 2502.17607.
"""

import os
from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers, which do not ask
    from gradmm.classification import check_fit, evaluate
    from gradmm.config import PRESETS, FinetuneConfig, ReleaseConfig, SynthesisConfig, preset
    from gradmm.data import Example, Splits, load_data, prompt_completion, sample_examples
    from gradmm.errors import DataWarning, UserError
    from gradmm.finetuning import finetune, fit
    from gradmm.mechanism import Ledger
    from gradmm.models import Model, load_model, wrap_model
    from gradmm.privacy import Release, load_release, release, release_once
    from gradmm.synthesis import SynthesisResult, synthesize
    from gradmm.tasks import TASKS, Task, load_task

# PyTorch's threads wait for one another at every operation, spinning; where another process wants the cores as well,
# each spins away the time for which the other waits. With this bound they spin for a moment and then sleep, which costs
# a lone run nothing (GNU's OpenMP reads it when torch is first imported). Whoever has set one of the two has decided.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

# Each name is imported when it is first asked for: a process that only runs notebooks should not wait for transformers.
_ROOMS = {
    "classification": ("check_fit", "evaluate"),
    "config": ("PRESETS", "FinetuneConfig", "ReleaseConfig", "SynthesisConfig", "preset"),
    "data": ("Example", "Splits", "load_data", "prompt_completion", "sample_examples"),
    "errors": ("DataWarning", "UserError"),
    "finetuning": ("finetune", "fit"),
    "mechanism": ("Ledger",),
    "models": ("Model", "load_model", "wrap_model"),
    "privacy": ("Release", "load_release", "release", "release_once"),
    "synthesis": ("SynthesisResult", "synthesize"),
    "tasks": ("TASKS", "Task", "load_task"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str):
    if name == "__version__":
        return globals().setdefault(name, metadata.version("gradmm"))
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'gradmm' has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(f"gradmm.{_ROOM_OF[name]}"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})

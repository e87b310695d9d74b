"""gradmm: readable synthetic text whose gradients match those of real text.

    task, data = gradmm.load_data("demo")
    model = gradmm.load_model("demo")
    real = gradmm.sample_examples(data.train, 50, task, seed=0)
    target = gradmm.release(model, task, real)
    result = gradmm.synthesize(model, task, target, gradmm.SynthesisConfig(seed=0))
    result.kept

Reference: Nguyen et al., ICML 2025, arXiv 2502.17607.
"""

from gradmm.classification import evaluate
from gradmm.errors import UserError
from gradmm.examples import Example, Splits, load_data, sample_examples
from gradmm.finetuning import finetune
from gradmm.mechanism import Ledger
from gradmm.models import Model, load_model
from gradmm.privacy import Release, load_release, release
from gradmm.settings import PRESETS, SynthesisConfig
from gradmm.synthesis import SynthesisResult, synthesize
from gradmm.tasks import TASKS, Task, load_task
from gradmm.training import FinetuneConfig

__all__ = [
    "PRESETS",
    "TASKS",
    "Example",
    "FinetuneConfig",
    "Ledger",
    "Model",
    "Release",
    "Splits",
    "SynthesisConfig",
    "SynthesisResult",
    "Task",
    "UserError",
    "evaluate",
    "finetune",
    "load_data",
    "load_model",
    "load_release",
    "load_task",
    "release",
    "sample_examples",
    "synthesize",
]

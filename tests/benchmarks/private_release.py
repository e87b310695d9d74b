"""What noise leaves of a release on a pretrained model, and what texts that it chooses are worth.

    python tests/benchmarks/private_release.py --model FOLDER --data sst2 --task notebooks/tasks/film-chat.yaml \
        --folder results/real --output book/records/04-privacy-smollm2-sst2.json --points 500:8 5000:1

First, by arithmetic, the cosine of the noised contrast to the exact one for every size, epsilon and space. Then, for
each point `n:epsilon`, n private examples are released with that epsilon in the space that is named, the release
chooses from the pool that `real_models.py` leaves in the folder, and the model learns the choice; beside them the
choice of noise alone, and the first texts of the pool, which nothing chose. Noise seeds are fixed, so nothing here is
private. Interrupted runs go on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from real_models import gradients_read_once, loaded, options_of, settings_of, tuning_of, written

import gradmm
from gradmm import files
from gradmm.data import Example, Splits, equal_counts
from gradmm.experiments import audit
from gradmm.experiments.baselines import noise_only
from gradmm.experiments.metrics import subsample
from gradmm.experiments.records import write_record
from gradmm.models import Model
from gradmm.plan import Plan
from gradmm.spaces import DIRECTED_SPACES, release_space
from gradmm.tasks import Task, tokenize_task

DELTA, CLIP = 1e-5, 1.0
NOISE, PROMPTS = "noise only", "prompts only"


def fidelity(model: Model, task: Task, splits: Splits, public: Sequence[str], options) -> list[dict]:
    """`audit.signal_to_noise` in spaces of ever fewer coordinates, named with their directions."""
    tokens = tokenize_task(task, model.tokenizer)
    spaces = {"label_rows": release_space(model, tokens, "label_rows")} | {
        f"{name}, {count} directions": release_space(model, tokens, name, public, count)
        for name in DIRECTED_SPACES for count in options.directions
    }  # fmt: skip
    many = gradmm.sample_examples(splits.train, max(options.sizes), task, options.seed)
    return audit.signal_to_noise(model, task, many, options.sizes, spaces, options.epsilons, DELTA, CLIP)


def choices(
    model: Model, task: Task, splits: Splits, pool: Sequence[Example], seed: int, options, names: Sequence[str]
) -> Iterator[tuple[str, list[Example]]]:
    """What the releases of these names choose from the pool: `n:epsilon`, or noise alone as at the last point; or what
    stands first in it.
    """
    config = gradmm.SynthesisConfig(n_synthetic=options.n_synthetic, temperature=options.temperature, seed=seed)
    public = [example.text for example in pool]
    for name in names:
        if name == PROMPTS:
            counts = enumerate(equal_counts(options.n_synthetic, len(task.labels)))
            yield name, [one for label, count in counts for one in [own for own in pool if own.label == label][:count]]
            continue
        n, epsilon = (name if name != NOISE else options.points[-1]).split(":")
        n = len(task.labels) if name == NOISE else int(n)  # noise does not depend on how many examples it is added to
        examples = gradmm.sample_examples(splits.train, n, task, seed)
        coordinates = {"space": options.space, "public_texts": public, "directions": options.directions[-1]}
        gradmm.release(model, task, examples, **coordinates, progress=False)  # held; a private one reads one by one
        target = gradmm.release(
            model, task, examples, epsilon=float(epsilon), delta=DELTA, clip=CLIP, length=options.length,
            noise_seed=seed, progress=False, **coordinates,
        )  # fmt: skip
        target = noise_only(target, seed + 1000) if name == NOISE else target
        yield name, Plan.of(model, task, target, config).selector.keep(pool)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and train what is missing, and write the record."""
    parser = options_of(__doc__)
    parser.add_argument("--points", nargs="*", default=[], help="n:epsilon, trained on")
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 500, 5000])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
    parser.add_argument("--directions", nargs="+", type=int, default=[1, 4, 16], help="the last one is trained with")
    parser.add_argument("--space", choices=DIRECTED_SPACES, default="body_subspace")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    task, splits = gradmm.load_data(options.data, options.task)
    model, upper = loaded(options.model, options)
    tuning = tuning_of(options, upper)
    tested, folder = subsample(splits.test, 0, options.max_test), Path(options.folder)
    settings = settings_of(options, model, splits.source) | {"delta": DELTA, "clip": CLIP}
    free = ("points", "sizes", "epsilons", "seed", "seeds", "threads")  # a row of the file depends on none of them
    depends = {name: value for name, value in settings.items() if name not in free}
    place = folder / f"private-{files.digest([model.fingerprint, depends])[:8]}.jsonl"
    rows = files.read_json_lines(place) if place.exists() else []
    for seed in range(options.seed, options.seed + options.seeds):
        pool = written(model, task, seed, options)
        done = {row["name"] for row in rows if row["seed"] == seed}
        missing = [name for name in ([*options.points, NOISE, PROMPTS] if options.points else []) if name not in done]
        with gradients_read_once():
            chosen = list(choices(model, task, splits, pool, seed, options, missing))
        for name, examples in chosen:
            found = upper.finetune(upper.model, task, examples, splits.validation, tested, replace(tuning, seed=seed))
            one = {"name": name, "seed": seed, "accuracy": found.accuracy, "calibrated": found.calibrated.accuracy}
            rows.append(one | {"validation_accuracy": found.validation_accuracy, "step": found.step})
            files.write_json_lines(place, rows)
    public = [example.text for example in written(model, task, options.seed, options)]
    with gradients_read_once():
        told = fidelity(model, task, splits, public, options)
    found = {"fidelity": told, "trained": rows, "n_test": len(tested)}
    write_record(options.output, found, settings)


if __name__ == "__main__":
    main()

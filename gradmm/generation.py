"""Zero-shot and few-shot generation by the same model: the baselines that write without matching anything.

Knows prompts, not gradients. Each text is drawn from its own random numbers, so it does not depend on which texts are
written beside it (up to rounding in the model's arithmetic). Letters: N texts, T steps, V vocabulary, C classes.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from gradmm.data import Example, check_examples, content_hash
from gradmm.decoding import check_room, decoder_of, side_by_side
from gradmm.device import in_batches
from gradmm.errors import COUNT, Rule, above_zero, check_settings, is_number, require, require_type, require_whole
from gradmm.models import Model, kind_of, require_model
from gradmm.progress import advance
from gradmm.readability import SENTENCE_ENDS, cut_to_sentence, ends_sentence, flaw, unquoted
from gradmm.seeds import generator
from gradmm.tasks import Task, TaskTokens, tokenize_task, warn_of_equal_prompts
from gradmm.vocabulary import NEVER, Vocabulary

LEVELS = 256  # of the logits, between the least and the greatest: leaves about a hundred of ten thousand tokens to sort
TOGETHER = {"cpu": 64, "other": 256}  # texts written side by side; a GPU takes fewer where its memory asks for it
FEWER = "take fewer shots or lower max_tokens"
SPARE = 16  # texts tried at least when some are missing; the first usable ones are kept, so it changes only the speed


RULES = {
    **dict.fromkeys(("max_tokens", "min_tokens", "shots", "batch_size", "rounds"), COUNT),
    "temperature": above_zero(1.0),
    "top_p": Rule(
        lambda value: is_number(value) and 0 < value <= 1,
        "{name} = {value}, it must be above 0 and at most 1: give such as 0.95",
    ),
}


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn.

    Attributes:
        temperature: divides the logits; 1 samples from the model.
        top_p: the smallest set of tokens of this probability is drawn from (Holtzman et al. 2020); 1 keeps all.
        max_tokens: tokens of a text at most, behind what its prompt begins it with; it is then cut back to its last
            sentence end.
        min_tokens: no text ends before it has this many tokens.
        shots: real examples of the class before each text, drawn anew for each; used when examples are given.
        separator: what stands between shots.
        batch_size: texts written side by side; None: 64 on a CPU, on a GPU as many as a share of it holds, at most
            256. It changes no text.
        rounds: how often missing texts are written anew before giving up.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 40
    min_tokens: int = 6
    shots: int = 4
    separator: str = "\n"
    batch_size: int | None = None
    rounds: int = 8

    def __post_init__(self) -> None:
        check_settings(self, RULES)
        require(
            self.min_tokens <= self.max_tokens,
            f"min_tokens = {self.min_tokens} is above max_tokens = {self.max_tokens}: lower it",
        )

    def together(self, device: torch.device) -> int:
        """How many texts are written side by side on a device."""
        return self.batch_size or TOGETHER[kind_of(device)]


@dataclass(frozen=True)
class Batch:
    """Texts written side by side: the tries `first` to `first + size - 1` of a class."""

    label: int
    first: int
    size: int


Share = Callable[[Sequence[Batch], Callable[[Batch], list[str]]], list[list[str]]]


def in_turn(batches: Sequence[Batch], write: Callable[[Batch], list[str]]) -> list[list[str]]:
    """Every batch written here, one after the other."""
    return [write(batch) for batch in batches]


def generate_texts(
    model: Model,
    task: Task,
    n_per_class: int,
    seed: int,
    sampling: Sampling | None = None,
    shots: Sequence[Example] = (),
) -> list[Example]:
    """Write `n_per_class` distinct, finished texts of each class.

    Zero-shot: the model continues the class's generation prompt; words at its end that begin a sentence belong to the
    text. Few-shot: real examples of the class, each behind the same instruction, stand before it; such texts can repeat
    real ones and are not private. A text begins with a word. It ends at an end token, at a line break, or with a
    sentence once it has `min_tokens` (see `readability.ends_sentence`); one that is cut off goes back to its last
    certain sentence end. Texts without a sentence end, shorter than `min_tokens` after the cut, with a
    `readability.flaw`, equal to a shot or to another text are dropped, and more are written. Classes with the same
    prompt are warned of.

    Args:
        shots: labelled real examples to draw shots from, whatever `check_examples` takes; none for zero-shot.

    Returns:
        C * n_per_class examples, class by class, in the order of their numbers.

    Raises:
        UserError: a class without shots though some are given, too few usable texts after `rounds`, a prompt that no
            text can be written behind (see `check_prompts`), or no token that ends a sentence.
    """
    kept, tries = _usable_texts(model, task, n_per_class, seed, sampling, shots, in_turn)
    for name, found in zip(task.labels, kept, strict=True):
        require(
            len(found) == n_per_class,
            f"{_came_out(len(found), n_per_class, name, tries[name])}: raise max_tokens, temperature or rounds, or ask "
            "for fewer",
        )
    return [example for found in kept for example in found]


def generate_counts(
    model: Model,
    task: Task,
    counts: Sequence[int],
    seed: int,
    sampling: Sampling | None = None,
    shots: Sequence[Example] = (),
    share: Share = in_turn,
) -> list[Example]:
    """A pool to choose from: of each class the first `counts[label]` texts that `generate_texts` would give.

    A class that comes to fewer after `rounds` has these, with a warning.

    Args:
        share: writes the batches of a round, all classes' together; they do not depend on one another, so it may share
            them out. The batches follow from the settings and from what earlier rounds gave.

    Raises:
        UserError: as `generate_texts`, but too few usable texts are none at all.
    """
    kept, tries = _usable_texts(model, task, max(counts), seed, sampling, shots, share)
    for name, count, found in zip(task.labels, counts, kept, strict=True):
        said = f"{_came_out(len(found), count, name, tries[name])}: raise length or temperature, or take other "
        said += "generation prompts or another model"
        require(len(found) > 0, said)
        if len(found) < count:
            warnings.warn(said, stacklevel=2)
    return [example for found, count in zip(kept, counts, strict=True) for example in found[:count]]


def _came_out(found: int, count: int, name: str, tries: int) -> str:
    return f"{found} of {count} texts of {name!r} came out finished, distinct and readable after {tries} tries"


def _usable_texts(
    model: Model,
    task: Task,
    n_per_class: int,
    seed: int,
    sampling: Sampling | None,
    shots: Sequence[Example],
    share: Share,
) -> tuple[list[list[Example]], dict[str, int]]:
    """Of each class at most `n_per_class` usable texts, and how many were tried; see `generate_texts`."""
    require_model(model)
    require_type(sampling, Sampling | None, "sampling", "give a Sampling")
    sampling, shots = sampling or Sampling(), check_examples(shots, task, "shot")
    n_per_class, seed = require_whole(n_per_class, "n_per_class", 1), require_whole(seed, "seed")
    pools = [[example.text for example in shots if example.label == label] for label in range(len(task.labels))]
    bare = [name for name, pool in zip(task.labels, pools, strict=True) if shots and not pool]
    require(not bare, f"the labels {bare} have 0 of the {len(shots)} shots: give at least one of each class")
    tokens = tokenize_task(task, model.tokenizer)
    check_prompts(model, tokens, model.vocabulary, [sampling.max_tokens] * len(pools), FEWER)
    warn_of_prompts(tokens, model.vocabulary)
    writer = Writer(model, tokens, sampling, _ending(model.vocabulary))

    def write(batch: Batch) -> list[str]:
        draws = [
            generator(seed, f"generation {batch.label}", unit) for unit in range(batch.first, batch.first + batch.size)
        ]
        return writer.write(batch.label, pools[batch.label], draws)

    most = sampling.together(model.device)
    return _in_rounds(task, n_per_class, sampling.rounds, most, shots, lambda batches: share(batches, write))


def _in_rounds(
    task: Task,
    n_per_class: int,
    rounds: int,
    most: int,
    shots: Sequence[Example],
    written: Callable[[Sequence[Batch]], list[list[str]]],
) -> tuple[list[list[Example]], dict[str, int]]:
    """Round after round of batches until every class has its usable texts, or the rounds are over."""
    tries: list[list[str]] = [[] for _ in task.labels]
    kept = _first_usable(tries, n_per_class, shots, task.instructions)
    for _ in range(rounds):
        batches = [
            batch
            for label, texts in enumerate(tries)
            for batch in next_batches(label, len(texts), n_per_class - len(kept[label]), most)
        ]
        if not batches:
            break
        for batch, texts in zip(batches, written(batches), strict=True):
            tries[batch.label] += texts
        kept = _first_usable(tries, n_per_class, shots, task.instructions)
    return kept, {name: len(texts) for name, texts in zip(task.labels, tries, strict=True)}


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Probabilities with all but the smallest set of tokens that holds `top_p` set to zero: (N, V) -> (N, V).

    Args:
        logits: -inf for tokens that must not be drawn.
        top_p: above 0 and at most 1.
    """
    probabilities = logits.softmax(-1)
    if top_p == 1:
        return probabilities
    return torch.where(logits >= BORDERS[kind_of(logits.device)](logits, probabilities, top_p), probabilities, 0)


def _by_levels(logits: Tensor, probabilities: Tensor, top_p: float) -> Tensor:
    """The least logit of each row's nucleus, (N, 1), by few numbers to sort: how many is asked of the device.

    The probability of each of many levels of logits tells on which of them the set ends; only its tokens are sorted.
    """
    high = logits.amax(-1, keepdim=True)
    low = torch.where(logits.isneginf(), high, logits).amin(-1, keepdim=True)
    levels = (
        ((logits - low) * ((LEVELS - 1) / (high - low).clamp_min(1e-30))).clamp(0, LEVELS - 1).nan_to_num(0.0).long()
    )
    held = torch.zeros(len(logits), LEVELS, dtype=probabilities.dtype, device=logits.device).scatter_add_(
        -1, levels, probabilities
    )
    border = LEVELS - 1 - (held.flip(-1).cumsum(-1) < top_p).sum(-1, keepdim=True).clamp_max(LEVELS - 1)
    there = levels == border
    near, places = torch.where(there, logits, -torch.inf).topk(max(1, int(there.sum(-1).max())), -1)
    mass = torch.where(levels > border, probabilities, 0).sum(-1, keepdim=True) + probabilities.gather(
        -1, places
    ).cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp_max(near.shape[-1] - 1)
    return near.gather(-1, last)


def _by_sorting(logits: Tensor, probabilities: Tensor, top_p: float) -> Tensor:
    """The same by one sort of all, which waits for nothing and moves some 130 bytes for each of N x V numbers.

    Halving an interval of logits until none is left between its ends would wait for nothing either; it moves 18 bytes
    for each of its 40 steps.
    """
    order, places = logits.sort(-1, descending=True)
    mass = probabilities.gather(-1, places).cumsum(-1)
    return order.gather(-1, (mass < top_p).sum(-1, keepdim=True).clamp_max(logits.shape[-1] - 1))


BORDERS = {"cpu": _by_levels, "other": _by_sorting}


def check_prompts(
    model: Model, tokens: TaskTokens, vocabulary: Vocabulary, rooms: Sequence[int], mend: str = "shorten one of them"
) -> None:
    """Refuse generation prompts that no text can be written behind.

    Args:
        rooms: C numbers of tokens that a text of each class may have behind its prompt.

    Raises:
        UserError: a prompt without a token, one that leaves no room in the context, one that holds a token that the
            model has no row for, or one behind which no token may begin a text.
    """
    check_room(model, tokens.prompts, rooms, mend)
    rows, device = vocabulary.needs.shape[1], vocabulary.needs.device
    for label, ids, room in zip(tokens.task.labels, tokens.prompts, rooms, strict=True):
        beyond = [tokens.tokenizer.convert_ids_to_tokens(token) for token in ids if token >= rows]
        require(
            not beyond,
            f"the generation prompt of label {label!r} holds {beyond[:1]}, which the model has no row for: resize its "
            "embeddings to the tokenizer, or set prompt_style: plain",
        )
        state, left, before = torch.tensor([[0], [room - 1], [ids[-1]]], device=device)
        require(
            bool((vocabulary.open_to(state, left) & ~vocabulary.stops & vocabulary.first(before)).any()),
            f"no token of {model.name} may begin a text behind the generation prompt of label {label!r}: end the "
            "prompt with a space, or give another model",
        )


def warn_of_prompts(tokens: TaskTokens, vocabulary: Vocabulary) -> None:
    """Warn where classes have the same generation prompt, and where one holds markup, which no text may hold."""
    warn_of_equal_prompts(tokens.task)
    for label, prompt in zip(tokens.task.labels, tokens.task.generation_prompts, strict=True):
        asked = tokens.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        found = tokens.tokenizer.decode([token for token in asked if token in vocabulary.markup][:1])
        if found:
            warnings.warn(
                f"the generation prompt of label {label!r} of task {tokens.task.name!r} holds {found!r}, a token of "
                "the model's own markup, which no text may hold: leave it out, or set prompt_style: chat, which sets "
                "such tokens itself",
                stacklevel=2,
            )


@torch.no_grad()
def continue_prompts(
    model: Model,
    tokens: TaskTokens,
    classes: Sequence[int],
    uniform: Tensor,
    sampling: Sampling,
    vocabulary: Vocabulary,
) -> Tensor:
    """Raw texts behind the classes' prompts, finished or not, in batches that change nothing but speed.

    Args:
        classes: N class numbers.
        uniform: (N, L) numbers in [0, 1), one for each token.
        sampling: temperature, top_p, min_tokens and batch_size are used.
        vocabulary: which tokens a text may hold where; `check_prompts` has let them pass.

    Returns:
        (N, L) tokens, the prompts' openings first; -1 after a text's end.

    Raises:
        UserError: none of the tokens ends a sentence.
    """
    writer = Writer(model, tokens, sampling, _ending(vocabulary))
    openings = [tokens.openings[label] for label in classes]
    room = torch.tensor([uniform.shape[1] - len(opening) for opening in openings])
    ids = writer.rows([tokens.prompts[label] for label in classes], uniform, room)
    begun = [[*opening, *text][: uniform.shape[1]] for opening, text in zip(openings, ids.tolist(), strict=True)]
    return torch.tensor(begun, device=model.device)


def prompted_texts(model: Model, tokens: TaskTokens, per_class: int, length: int = 32, seed: int = 0) -> list[str]:
    """Texts as the model writes them from the public prompts, class by class, cut or not: a sample of what it knows.

    Args:
        per_class: texts of each class.
        length: tokens of a text at most; fewer where the context is shorter.

    Raises:
        UserError: as `check_prompts`, or no token ends a sentence.
    """
    around, opened = (
        max(map(len, (tokens.start + tokens.prefix + tokens.suffix, *tokens.prompts))),
        max(map(len, tokens.openings)),
    )
    length = max(1 + opened, min(length + opened, model.context - around))
    check_prompts(model, tokens, model.vocabulary, [length - len(opening) for opening in tokens.openings])
    classes = [label for label in range(len(tokens.labels)) for _ in range(per_class)]
    uniform = torch.stack(
        [torch.rand(length, generator=generator(seed, "prompted texts", row)) for row in range(len(classes))]
    )
    sampling = Sampling(max_tokens=length, min_tokens=1)
    ids = continue_prompts(model, tokens, classes, uniform, sampling, model.vocabulary)
    return [tokens.decode(token for token in row if token >= 0) for row in ids.tolist()]


def _ending(vocabulary: Vocabulary) -> Vocabulary:
    """The same.

    Raises:
        UserError: none of its tokens ends a sentence.
    """
    found = bool((vocabulary.closes & (vocabulary.needs[0] < NEVER)).any())
    require(found, f"none of the allowed tokens ends a sentence with one of {SENTENCE_ENDS}: allow one")
    return vocabulary


def next_batches(label: int, tried: int, missing: int, most: int) -> list[Batch]:
    """A round of a class: a try for each text that is missing, but `SPARE` at least, `most` of them in a batch."""
    tries = range(tried, tried + max(missing, SPARE) if missing > 0 else tried)
    return [Batch(label, tries[place], len(tries[place : place + most])) for place in range(0, len(tries), most)]


def _first_usable(
    tries: Sequence[Sequence[str]], count: int, shots: Sequence[Example], instructions: Sequence[str]
) -> list[list[Example]]:
    """The first `count` usable texts of each class in the order of their numbers, readable, none twice and no shot."""
    taken = {content_hash(example.text) for example in shots}
    kept: list[list[Example]] = [[] for _ in tries]
    for label, texts in enumerate(tries):
        for text in texts:
            digest = content_hash(text)
            if text and digest not in taken and len(kept[label]) < count and flaw(text, instructions[label]) is None:
                taken.add(digest)
                kept[label].append(Example(text, label))
    return kept


@dataclass(frozen=True)
class Writer:
    """Writes batches of texts."""

    model: Model
    tokens: TaskTokens
    sampling: Sampling
    vocabulary: Vocabulary

    def write(self, label: int, pool: list[str], draws: list[torch.Generator]) -> list[str]:
        """One text for each generator; an empty string where it came to nothing.

        Raises:
            UserError: a prompt with its shots leaves no room in the context.
        """
        prompts = [self._prompt(label, pool, draw) for draw in draws]
        room = torch.full((len(prompts),), self.sampling.max_tokens)
        check_room(self.model, prompts, room.tolist(), FEWER)
        uniform = torch.stack([torch.rand(self.sampling.max_tokens, generator=draw) for draw in draws])
        return [self._finish(label, row) for row in self.rows(prompts, uniform, room).tolist()]

    def rows(self, prompts: Sequence[Sequence[int]], uniform: Tensor, room: Tensor) -> Tensor:
        """`_sample` of any number of prompts, as many side by side as the device holds."""
        ids, device = torch.full(uniform.shape, -1, device=self.model.device), self.model.device

        def work(some: list[int]) -> None:
            ids[some] = self._sample([prompts[row] for row in some], uniform[some].to(device), room[some].to(device))
            advance(len(some))

        length = max(map(len, prompts)) + uniform.shape[1]
        size = min(self.sampling.together(self.model.device), side_by_side(self.model, len(prompts), length))
        in_batches(work, [some.tolist() for some in torch.arange(len(prompts)).split(size)])
        return ids

    def _prompt(self, label: int, pool: list[str], draw: torch.Generator) -> list[int]:
        """The class's prompt, with shots drawn for this text, see `TaskTokens.prompt`."""
        if not pool:
            return list(self.tokens.prompts[label])
        chosen = torch.randperm(len(pool), generator=draw)[: self.sampling.shots].tolist()
        return list(self.tokens.prompt(label, [pool[row] for row in chosen], self.sampling.separator))

    @torch.no_grad()
    def _sample(self, prompts: Sequence[Sequence[int]], uniform: Tensor, room: Tensor) -> Tensor:
        """Continue N prompts: uniform (N, T) numbers in [0, 1) -> (N, T) tokens; after a text's end all are -1.

        Args:
            room: (N,) how many tokens each text may have, at most T.
        """
        shape, device = uniform.shape, self.model.device
        ids, asked = torch.full(shape, -1, device=device), torch.zeros(shape, dtype=torch.bool, device=device)
        rows = torch.arange(len(prompts), device=device)
        before = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        state, closed, done = torch.zeros_like(rows), *torch.zeros(2, len(rows), dtype=torch.bool, device=device)
        with decoder_of(self.model, prompts, shape[1]) as reader:
            for step in range(shape[1]):
                left = (room[rows] - 1 - step).clamp_min(0)
                token = self._draw(reader.state, uniform[rows, step], self._open_to(state, left, step, before))
                stops = self.vocabulary.stops[token]
                ids[rows, step] = torch.where(done, -1, torch.where(stops, self.vocabulary.left[token], token))
                done = done | stops
                asked[rows, step] = closed & ~self.vocabulary.closers[token] & (step >= self.sampling.min_tokens)
                last = step + 1 == shape[1]
                if last or reader.due:
                    done = done | self._cut(ids, asked)[rows]
                if last:
                    break
                done = done | (left == 0)
                going = reader.read_on(token, done)
                state = self.vocabulary.state_after(state, token).masked_fill(done, 0)
                rows, state, closed, done = rows[going], state[going], self._closed(token, closed)[going], done[going]
                if len(rows) == 0:
                    break
        return ids

    def _open_to(self, state: Tensor, left: Tensor, step: int, before: Tensor) -> Tensor:
        """Tokens that each text may go on with: (N, V), or (V,) for all.

        Args:
            state, left: (N,) see `Vocabulary.open_to`.
            before: (N,) the last token of each prompt.
        """
        vocabulary = self.vocabulary
        allowed = vocabulary.open_to(state, left) & ~vocabulary.stops
        if step == 0:
            allowed = allowed & vocabulary.first(before)
        if step < self.sampling.min_tokens:
            return allowed
        return allowed | (vocabulary.stops & (state == 0).unsqueeze(1) if allowed.ndim > 1 else vocabulary.stops)

    def _closed(self, token: Tensor, closed: Tensor) -> Tensor:
        """Which texts may have ended with this token of each: it closes a sentence, or is a quote, a bracket or a space
        behind one that does.
        """
        return self.vocabulary.closes[token] | (closed & self.vocabulary.closers[token])

    def _cut(self, ids: Tensor, asked: Tensor) -> Tensor:
        """Take from texts (N, T) what stands behind the end of their sentence: which of them have ended there, (N,).

        Args:
            asked: (N, T) tokens that aren't part of the text if the sentence before them has ended; all are answered.
        """
        ends = [ids.shape[1]] * len(ids)
        found = (asked & (ids >= 0)).nonzero().tolist()
        tokens = ids.tolist() if found else []
        pieces = self.model.pieces
        for row, place in found:
            first = place
            while first and pieces[tokens[row][first - 1]] == " ":
                first -= 1
            after = " " * (place - first) + pieces[tokens[row][place]]
            if self.sampling.min_tokens <= first < ends[row] and ends_sentence(
                self.tokens.decode(tokens[row][:first]), after
            ):
                ends[row] = first
        asked.zero_()
        end = torch.tensor(ends, device=ids.device)
        ids.masked_fill_(torch.arange(ids.shape[1], device=ids.device) >= end.unsqueeze(1), -1)
        return end < ids.shape[1]

    def _draw(self, state: Tensor, uniform: Tensor, open_to: Tensor) -> Tensor:
        """One token each by the inverse of the probabilities cumulated over the nucleus: (N, D), (N,) -> (N,).

        Args:
            open_to: (N, V) or (V,) bool, the tokens that may be drawn.
        """
        logits = linear(state, self.model.head_weight, self.model.head_bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.sampling.temperature
        cumulated = nucleus(logits.masked_fill(~open_to, -torch.inf), self.sampling.top_p).cumsum(-1)  # (N, V)
        whole = cumulated[:, -1:].contiguous()
        place = torch.searchsorted(cumulated, uniform[:, None].to(cumulated.dtype) * whole, right=True)
        return torch.minimum(place, torch.searchsorted(cumulated, whole)).squeeze(
            -1
        )  # a product may round up to the whole

    def _finish(self, label: int, row: list[int]) -> str:
        """The text of a row of tokens behind its class's opening, back to its last certain sentence end and `unquoted`.

        Empty if that leaves no word or too few tokens.
        """
        written = [token for token in row if token >= 0]
        text = " ".join(self.tokens.decode([*self.tokens.openings[label], *written]).split())
        text = unquoted(cut_to_sentence(text, complete=len(written) < len(row)))
        long_enough = len(self.tokens.encode(text)) >= self.sampling.min_tokens
        return text if long_enough and any(letter.isalnum() for letter in text) else ""

"""Single-token swaps in finished texts: ranked by the gradient of f, tried exactly, taken while the text stays as fluent.

Knows one class and no run. Letters: N texts, L tokens, D width, V vocabulary, k candidates of a position, T trials.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmm.evaluation import is_complete_sentence, perplexities
from gradmm.gradients import Exchange
from gradmm.plan import Plan
from gradmm.products import linear
from gradmm.projection import inner_products, text_mask


@dataclass(frozen=True)
class Replacement:
    """A text with one token replaced."""

    row: int
    position: int
    token: int
    text: str


@dataclass(frozen=True)
class Swap:
    """A trial that was taken, and f of the whole group after it."""

    trial: Replacement
    match: float


@dataclass(frozen=True)
class Swapper:
    """Rounds of swaps in the texts of one class, which are one group.

    Attributes:
        plan: its config's top_k, tries and fluency_slack are used.
        number: the class.
        limits: (N,) the log-perplexity under the model that each text must not exceed.
        complete: (N,) whether a text began as a complete sentence (`evaluation.is_complete_sentence`) and has to stay one.
    """

    plan: Plan
    number: int
    limits: tuple[float, ...]
    complete: tuple[bool, ...]

    @staticmethod
    def of(plan: Plan, number: int, texts: Sequence[str]) -> "Swapper":
        """For texts as they begin."""
        limits = tuple(math.log(value) + plan.config.fluency_slack for value in perplexities(plan.model, texts))
        return Swapper(plan, number, limits, tuple(map(is_complete_sentence, texts)))

    def round(self, ids: Tensor) -> tuple[Tensor, list[Swap]]:
        """One round: f falls with every swap, and no text has more than one.

        The `tries` replacements of each text that promise most to first order are measured exactly, all in one batch. Of those
        that are fluent, the one that lowers the group's f most is taken, again and again: f with each is known in closed form
        from the gradients that were measured, whatever was taken before in other texts.

        Args:
            ids: (N, L) tokens, the end token behind each text.

        Returns:
            The tokens after the swaps, and the swaps in the order of taking; none if no trial lowers f.
        """
        texts = [self.plan.tokens.decode(row) for row in self._rows(ids)]
        trials = self._usable(ids, texts, self._promising(ids))
        if not trials:
            return ids, []
        matching, tried = self.plan.matching, [trial.text for trial in trials]
        factors = matching.factors([*texts, *tried], [self.number] * (len(texts) + len(tried)))
        swaps = self._take(trials, Exchange.of(factors, matching.targets[self.number], len(texts), matching.distance))
        moved = ids.clone()
        for swap in swaps:
            moved[swap.trial.row, swap.trial.position] = swap.trial.token
        return moved, swaps

    def _take(self, trials: Sequence[Replacement], group: Exchange) -> list[Swap]:
        """The swaps to make, given a group of N texts with the T trials behind them."""
        device, size = group.members.device, len(group.members)
        places = torch.tensor([trial.row for trial in trials], device=device)
        others = size + torch.arange(len(trials), device=device)
        current, swaps, left, fluent = group.loss(), [], list(range(len(trials))), {}
        while left:
            losses = dict(zip(left, group.losses(places[left], others[left]).tolist(), strict=True))
            lower = [t for t in left if losses[t] < current]
            fluent |= self._fluent(trials, [t for t in lower if t not in fluent])  # no text is read that could not be taken
            lower = [t for t in lower if fluent[t]]
            if not lower:
                break
            best = min(lower, key=losses.__getitem__)
            taken, current = trials[best], losses[best]
            group = group.exchanged(taken.row, size + best)
            swaps.append(Swap(taken, current))
            left = [t for t in left if trials[t].row != taken.row and trials[t].text != taken.text]
        return swaps

    def _fluent(self, trials: Sequence[Replacement], numbers: Sequence[int]) -> dict[int, bool]:
        """Whether the log-perplexity of each of the numbered trials is within its text's limit."""
        found = perplexities(self.plan.model, [trials[t].text for t in numbers])
        return {t: math.log(value) <= self.limits[trials[t].row] for t, value in zip(numbers, found, strict=True)}

    def _usable(self, ids: Tensor, texts: Sequence[str], wanted: Sequence[tuple[int, int, int]]) -> list[Replacement]:
        """Trials whose text reads back as the same tokens, stands nowhere else, and is as complete as it began."""
        rows, tokens, found = self._rows(ids), self.plan.tokens, []
        for row, position, token in wanted:
            changed = [*rows[row][:position], token, *rows[row][position + 1 :]]
            text = tokens.decode(changed)
            whole = is_complete_sentence(text) or not self.complete[row]
            if whole and text not in texts and tokens.encode(text) == changed:
                found.append(Replacement(row, position, token, text))
        return found

    def _rows(self, ids: Tensor) -> list[list[int]]:
        """Each text's tokens without its end."""
        counts = text_mask(ids, self.plan.reading.end).sum(-1).tolist()
        return [row[:count] for row, count in zip(ids.tolist(), counts, strict=True)]

    def _promising(self, ids: Tensor) -> list[tuple[int, int, int]]:
        """(text, position, token) of the replacements that lower f most to first order, `tries` of each text at most.

        Candidates are the top_k tokens that the model finds likeliest at a position behind the class's prompt and the text to
        its left; to first order, one changes f by the inner product of the gradient there with the difference of embeddings.
        """
        inside, table = text_mask(ids, self.plan.reading.end).bool(), self.plan.tables.embedding
        candidates, possible = self._likeliest(ids)  # (N, L, k)
        _, gradient = self.plan.matching.of_tokens(ids, self.number, self._at_once)
        flat = gradient.flatten(0, 1)
        gained = inner_products(table, candidates.flatten(0, 1), flat) - inner_products(table, ids.view(-1, 1), flat)
        possible = possible & inside.unsqueeze(-1) & (candidates != ids.unsqueeze(-1))
        change = gained.view_as(candidates).masked_fill(~possible, torch.inf).flatten(1)  # (N, L k)
        values, places = change.topk(min(self.plan.config.tries, change.shape[1]), dim=-1, largest=False)
        k, chosen = candidates.shape[-1], candidates.flatten(1)
        return [
            (row, place // k, int(chosen[row, place]))
            for row, (some, where) in enumerate(zip(values.tolist(), places.tolist(), strict=True))
            for value, place in zip(some, where, strict=True)
            if value < math.inf
        ]

    @torch.no_grad()
    def _likeliest(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The top_k allowed tokens at each position, given prompt and text to its left: (N, L, k), and whether each may be taken."""
        model, reading, prompt = self.plan.model, self.plan.reading, self.plan.tokens.prompts[self.number]
        model.check_lengths([[*prompt, *row] for row in self._rows(ids)])
        before, parts = torch.tensor(prompt, device=ids.device), []
        for some in ids.split(self._at_once):
            read = torch.cat([before.expand(len(some), -1), some], dim=1)
            states = model.body(inputs_embeds=model.embed(read), use_cache=False).last_hidden_state[:, len(prompt) - 1 : -1]
            logits = linear(states, model.head_weight, model.head_bias).masked_fill(~reading.allowed, -torch.inf)
            parts.append(logits.topk(reading.k, dim=-1))
        return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts]) > -torch.inf

    @property
    def _at_once(self) -> int:
        """Texts that the model sees at once with a graph behind them."""
        return self.plan.config.group_size * (self.plan.solver.groups_per_pass or 1)

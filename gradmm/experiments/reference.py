"""The literal method, slow and plain: the oracle of the tests and the baseline of every speed figure.

One group at a time, the head's gradient as an explicit V x D matrix with a graph behind it, the whole prefix recomputed
for every token, full sorts of the vocabulary. It shares no numerical code with the fast path, only the model, the
settings and Adam. Letters: B examples of a group, L positions of text, D hidden width, V vocabulary, n real examples.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, embedding, linear

from gradmm.admm import Config


def head_gradient(lm, embeds: Tensor, labels: Tensor, create_graph: bool = False) -> list[Tensor]:
    """The gradient of the mean loss over a batch with respect to the head: [(V, D)] or [(V, D), (V,)].

    Args:
        embeds: (B, T, D) input embeddings of whole prompts, without padding.
        labels: (B,) verbalizer tokens.
    """
    head = lm.get_output_embeddings()
    bias = getattr(head, "bias", None)
    parameters = [p.detach().clone().requires_grad_(True) for p in (head.weight, bias) if p is not None]
    with sdpa_kernel(SDPBackend.MATH):
        hidden = lm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]
    logits = linear(hidden, *parameters)
    return list(torch.autograd.grad(cross_entropy(logits, labels), parameters, create_graph=create_graph))


def real_gradient(lm, sequences: Sequence[Sequence[int]], labels: Sequence[int]) -> list[Tensor]:
    """The mean of the head's gradients of real prompts, one after the other."""
    layer = lm.get_input_embeddings()  # by the layer, which may scale what it looks up
    total: list[Tensor] = []
    for ids, label in zip(sequences, labels, strict=True):
        embeds = layer(torch.tensor([ids], device=layer.weight.device))
        found = head_gradient(lm, embeds, torch.tensor([label], device=layer.weight.device))
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return [value.detach() / len(sequences) for value in total]


def distance(gradient: Sequence[Tensor], target: Sequence[Tensor], kind: str) -> Tensor:
    """1 - cosine averaged over tensors, or the squared Euclidean distance summed over tensors."""
    pairs = list(zip(gradient, target, strict=True))
    if kind == "l2":
        return torch.stack([(a - b).pow(2).sum() for a, b in pairs]).sum()
    return torch.stack([1 - (a * b).sum() / (a.norm() * b.norm()) for a, b in pairs]).mean()


def match_loss(
    lm, x: Tensor, before: Tensor, after: Tensor, labels: Tensor, target: Sequence[Tensor], kind: str
) -> Tensor:
    """f of one group: x (B, L, D) between constant template embeddings (P, D) and (S, D)."""
    count = x.shape[0]
    embeds = torch.cat([before.expand(count, -1, -1), x, after.expand(count, -1, -1)], dim=1)
    return distance(head_gradient(lm, embeds, labels, create_graph=True), target, kind)


def project(lm, v: Tensor, prompt: Sequence[int], order: str, k: int, allowed: Tensor) -> Tensor:
    """Project each row of v (B, L, D) on readable tokens, token by token: ids (B, L). `allowed` is a (V,) bool mask."""
    layer = lm.get_input_embeddings()
    with torch.no_grad():
        table = layer(torch.arange(len(layer.weight), device=v.device))  # as the layer gives it: some families scale
        return torch.stack([_project_row(lm, table, row, list(prompt), order, k, allowed) for row in v])


def _project_row(lm, table: Tensor, row: Tensor, ids: list[int], order: str, k: int, allowed: Tensor) -> Tensor:
    chosen: list[int] = []
    for target in row:
        logits = lm(input_ids=torch.tensor([ids + chosen], device=row.device), use_cache=False).logits[0, -1]
        likely = logits.masked_fill(~allowed, -torch.inf)
        far = (table - target).pow(2).sum(-1).masked_fill(~allowed, torch.inf)
        if order == "lm_then_nearest":
            candidates = likely.sort(descending=True).indices[:k]
            best = candidates[far[candidates].sort().indices[0]]
        else:
            candidates = far.sort().indices[:k]
            best = candidates[likely[candidates].sort(descending=True).indices[0]]
        chosen.append(int(best))
    return torch.tensor(chosen, device=row.device)


def solve(
    f: Callable[[Tensor], Tensor],
    projection: Callable[[Tensor], Tensor],
    table: Tensor,
    x: Tensor,
    config: Config,
) -> tuple[Tensor, float]:
    """ADMM on one group, as written in the paper with z first: (best ids (B, L), their f).

    Args:
        table: (V, D) embeddings as the first layer gets them.
    """
    lam, rho = torch.zeros_like(x), config.rho
    best_ids, best = torch.empty(0), float("inf")
    for outer in range(config.outer_steps + 1):
        ids = projection(x + lam / rho)
        z = embedding(ids, table)
        value = float(f(z).detach())
        if value < best:
            best_ids, best = ids, value
        if outer == config.outer_steps:
            break
        x = x.clone().requires_grad_(True)
        adam = torch.optim.Adam([x], lr=config.lr)
        for _ in range(config.inner_steps):
            adam.zero_grad()
            (f(x) + rho / 2 * (x - z + lam / rho).pow(2).sum()).backward()
            torch.nn.utils.clip_grad_norm_([x], float("inf") if config.clip is None else config.clip)
            adam.step()
        x = x.detach()
        lam = lam + rho * (x - z)
    return best_ids, best

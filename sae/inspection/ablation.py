"""What the model itself says of a latent: its next-token distribution with the latent set to zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from sae.activations.hookpoints import visiting, without_cache
from sae.activations.language_model import causal_head
from sae.activations.model_loss import LOGITS_AT_ONCE
from sae.dictionaries import Dictionary
from sae.inspection.latent import Ablation

RANDOM_DIRECTIONS = 4
"""Random directions subtracted instead of each latent's; scores of single ones scatter widely."""
_SHOWN = 10
_Change = Callable[[Tensor], Tensor | None]


@torch.inference_mode()
def measure_ablations(
    model: PreTrainedModel,
    hookpoint: str,
    dictionary: Dictionary,
    token_ids: Int[Tensor, "sequences context"],
    firings: Mapping[int, Sequence[tuple[int, int]]],
    cached: Bool[Tensor, "sequences context"] | None = None,
) -> dict[int, Ablation]:
    """Sets each latent to zero in contexts where it fires, and compares the next-token distributions.

    The error of the reconstruction is kept: x becomes x - z_i d_i at every token of the context where the
    latent fires, and the prediction is read at the firing in question. Changes of logits are taken
    relative to the vocabulary's mean. As a null, random directions of the same length are subtracted at
    the same tokens.

    Args:
        model: with a causal head.
        hookpoint: of the dictionary.
        dictionary: gives latents and directions.
        token_ids: contexts.
        firings: latent -> (sequence, position) of the firings to measure at.
        cached: positions where latents can fire, those of the cache's rows; None = all.

    Returns:
        latent -> what was measured; latents without firings are left out.
    """
    jobs = [(latent, *place) for latent, places in firings.items() for place in places]
    random = {latent: _random_directions(latent, dictionary.d_model) for latent in firings}
    sums: dict[int, Tensor] = {}
    divergences: dict[int, list[list[float]]] = {}
    head = causal_head(model)
    assert head is not None, "the model predicts no next token"
    vocabulary = len(next(head.parameters()))
    at_once = max(1, LOGITS_AT_ONCE // (vocabulary * token_ids.shape[1]))
    chunks = [jobs[i : i + at_once] for i in range(0, len(jobs), at_once)]
    for chunk in tqdm(chunks, desc="ablations", unit=" batches", leave=False):
        latents, sequences, positions = (torch.tensor(column) for column in zip(*chunk, strict=True))
        of_random = torch.stack([random[latent] for latent in latents.tolist()], dim=1)
        of_latents = dictionary.directions[latents.to(dictionary.device)]
        present = None if cached is None else cached[sequences]
        clean, *changed = (
            _next_token_logits(model, hookpoint, token_ids[sequences], positions, change)
            for change in (
                _keep,
                *(_subtraction(dictionary, latents, d, present) for d in (of_latents, *of_random)),
            )
        )
        changes = torch.stack([clean - logits for logits in changed], dim=1)
        changes -= changes.mean(-1, keepdim=True)
        for row, (latent, _, _) in enumerate(chunk):
            sums[latent] = sums[latent] + changes[row] if latent in sums else changes[row].clone()
            kls = [_kl(clean[row], logits[row]) for logits in changed]
            divergences.setdefault(latent, []).append(kls)
    return {latent: _ablation(sums[latent], divergences[latent]) for latent in sums}


def _random_directions(latent: int, d_model: int) -> Float[Tensor, "draws d_model"]:
    """Always the same ones for a latent, whatever else is measured with it."""
    generator = torch.Generator().manual_seed(latent)
    return F.normalize(torch.randn(RANDOM_DIRECTIONS, d_model, generator=generator), dim=-1)


def _next_token_logits(
    model: PreTrainedModel, hookpoint: str, ids: Tensor, positions: Tensor, change: _Change
) -> Float[Tensor, "sequences vocabulary"]:
    """Logits at one position of each sequence, with the residual stream changed at the hookpoint."""
    with visiting(model, hookpoint, change):
        logits = model(input_ids=ids.long().to(model.device), **without_cache(model)).logits
    return logits[torch.arange(len(ids)), positions].float().cpu()


def _keep(_x: Tensor) -> None:
    """Leaves the residual stream as it is."""


def _subtraction(
    dictionary: Dictionary,
    latents: Int[Tensor, " sequences"],
    remove: Float[Tensor, "sequences d_model"],
    cached: Bool[Tensor, "sequences context"] | None,
) -> _Change:
    """Takes activation * `remove` from each sequence at the tokens where its latent fires.

    All other tokens keep their bits. Those that are not cached are not even encoded: the dictionary
    never saw their like, and what it says of them means nothing.
    """

    def subtract(x: Tensor) -> Tensor:
        own = dictionary.directions
        present = torch.ones(x.shape[:2], dtype=torch.bool) if cached is None else cached
        sequence, position = present.to(own.device).nonzero(as_tuple=True)
        rows = x.to(own.device, own.dtype)[sequence, position]
        code = dictionary.encode_sparse(rows)
        mine = code.indices == latents.to(own.device)[sequence[code.rows]]
        here = code.rows[mine]
        sequence, position = sequence[here], position[here]
        new = x.clone()
        less = rows[here] - code.values[mine, None] * remove.to(rows)[sequence]
        new[sequence.to(x.device), position.to(x.device)] = less.to(x.device, x.dtype)
        return new

    return subtract


def _kl(clean: Tensor, changed: Tensor) -> float:
    p, q = clean.log_softmax(-1), changed.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def _ablation(total: Float[Tensor, "changes vocabulary"], divergences: list[list[float]]) -> Ablation:
    """From sums of the change of logits and KLs per firing; the latent's own first, then random ones."""
    mean, *random = total / len(divergences)
    count = min(_SHOWN, len(mean))
    kl, *random_kls = torch.tensor(divergences).mean(0).tolist()
    return Ablation(
        raised=[(int(t), float(mean[t])) for t in mean.topk(count).indices],
        lowered=[(int(t), float(mean[t])) for t in (-mean).topk(count).indices],
        kl=kl,
        random_kl=sum(random_kls) / len(random_kls),
        random_change=sum(float(change.max()) for change in random) / len(random),
        positions=len(divergences),
    )

"""One dictionary in training: its loss, and what it remembers from step to step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.dictionaries import SparseAutoencoder
from sae.dictionaries.linear_encoder import LinearEncoder
from sae.dictionaries.penalised import Penalised
from sae.ops.group import ALONE, Group
from sae.training.averaging import WeightAverages
from sae.training.controls import Control, NearStart, common_factor, freeze
from sae.training.dead_latents import DeadLatents, count_firings
from sae.training.losses import auxk_loss, pre_activation_loss
from sae.training.recipe import Recipe
from sae.training.revival import resample, whose_turn
from sae.training.riders import GradientRiders
from sae.training.sparsity import SparsityControl

RIDERS_BESIDE_LATENTS = 8
"""Numbers that ride on the gradients besides one for each latent and the kind's news."""


class Losses(NamedTuple):
    """The loss of a batch of this rank, and what may be logged of it (means over rows)."""

    total: Float[Tensor, ""]
    """To be differentiated; what rides on the gradients is in it."""
    residual: Float[Tensor, "rows d_model"]
    parts: dict[str, Tensor]
    """Without gradients: l0, and every term by name."""


class Learner(nn.Module):
    """A dictionary with all that its training keeps: counters, controls, what the ranks tell each other.

    It knows nothing of Lightning. A step is: `loss`, backward, `arrive`, the optimiser's step, `settle`.
    Several ranks that share a batch train as one rank on the whole of it.
    """

    energy: Tensor
    seed: Tensor

    def __init__(
        self,
        dictionary: SparseAutoencoder,
        recipe: Recipe,
        ema_decay: float | None = None,
        control: Control | None = None,
    ) -> None:
        super().__init__()
        self.dictionary, self.recipe = dictionary, recipe
        freeze(dictionary, control)
        self.near_start = NearStart(dictionary.W_dec) if control == "soft_decoder" else None
        self._resizes = control == "encoder"
        self.ways = recipe.ways_for(dictionary)
        n_latents = dictionary.n_latents
        self.dead_latents = DeadLatents(n_latents, recipe.dead_after_tokens or 1)
        news = dict.fromkeys(dictionary.news, 1)
        self.riders = GradientRiders(fired=n_latents, energy=1, rows=1, batches=1, asked=2, broken=3, **news)
        self.register_buffer("energy", torch.ones(()))  # mean square of the residual at the last step
        # Of all that is drawn here; a rank that joins when a run is resumed has other generators.
        self.register_buffer("seed", torch.tensor(torch.initial_seed() % 2**62))
        self.sparsity: SparsityControl | None = None
        if isinstance(dictionary, Penalised) and control != "encoder":  # else a penalty moves nothing
            self.sparsity = SparsityControl(
                dictionary.target_l0, dictionary.sparsity_coefficient, dictionary.warms_up_for
            )
        self.averages = None if ema_decay is None else WeightAverages(dictionary, ema_decay)
        self.planned_steps, self.tokens_per_step = 1, 1
        self._residual: Tensor | None = None
        self._news: dict[str, Tensor] = {}

    def plan(self, steps: int, tokens_per_step: int) -> None:
        """Says how long the run will be, and how many rows of all ranks a step has."""
        self.planned_steps, self.tokens_per_step = steps, tokens_per_step
        self.dead_latents.dead_after_tokens = self.recipe.dead_after(steps * tokens_per_step)

    def loss(
        self,
        u: Float[Tensor, "rows d_model"],
        step: int,
        asked: Float[Tensor, " two"] | None = None,
        group: Group = ALONE,
    ) -> Losses:
        """The loss of normalised rows, at an optimiser step counted from 0.

        Args:
            u: this rank's rows.
            step: optimiser steps done.
            asked: whether this rank is asked to stop, and to be queued again.
            group: the ranks that share the batch.
        """
        dictionary = self.dictionary
        dictionary.l0_factor = self.recipe.l0_factor(dictionary, step, self.planned_steps)
        code = dictionary.training_code(u, group, self._turn(step, len(u) * group.world, u.device))
        residual, reconstruction, energy = dictionary.reconstruct(u, code)
        parts = {"reconstruction": reconstruction, **dictionary.other_losses(u, code)}
        terms = [*parts.values()]
        if self.sparsity is not None:
            assert isinstance(dictionary, Penalised)
            parts["coefficient"] = self.sparsity.coefficient(step / self.planned_steps)
            parts["penalty"] = dictionary.penalty(code)
            terms.append(parts["coefficient"] * parts["penalty"])
        dead = self.dead_latents.ids
        if len(dead) > 0 and "auxk" in self.ways:
            parts["auxk"] = auxk_loss(dictionary, residual, code, dead, self.energy)
            terms.append(self.recipe.auxk_coefficient * parts["auxk"])
        if len(dead) > 0 and "pre_act" in self.ways:
            parts["pre_act"] = pre_activation_loss(dictionary, code, dead)
            terms.append(self.recipe.pre_act_coefficient * parts["pre_act"])
        if self._resamples_after(step):
            self._residual = residual.detach()
        total = torch.stack([term.to(reconstruction) for term in terms]).sum()
        fired = count_firings(code.latents, dictionary.n_latents)
        parts["l0"] = fired.sum() / len(u)
        one = torch.ones_like(reconstruction)
        boarded = self.riders.board(
            fired=fired,
            energy=energy,
            rows=one * len(u),
            batches=one,
            asked=torch.zeros(2, device=u.device) if asked is None else asked,
            broken=torch.stack([~total.isfinite(), ~u.sum().isfinite(), ~dictionary.exact_are_finite()]),
            **code.news,
        )
        return Losses(total + boarded, residual, {name: part.detach() for name, part in parts.items()})

    @torch.no_grad()
    def arrive(self, step: int) -> Tensor:
        """After the last backward pass of a step: takes what came with the gradients.

        Returns:
            Five flags, each above 0 if it holds on any rank: asked to stop, asked to be queued again,
            something is not finite, a row is not finite, a threshold is not finite.
        """
        arrived = self.riders.arrive()
        flags = torch.cat([arrived["asked"].nan_to_num(0.0), arrived["broken"].nan_to_num(1.0)])
        flags[2] += flags[4]
        sound = flags[2] + flags[3] == 0
        share = arrived["batches"].squeeze()  # below 1 where a pass ends within an accumulated step
        self.dead_latents.update(arrived["fired"] > 0, (share * self.tokens_per_step).round().long(), step)
        self.energy.copy_(torch.where(sound, arrived["energy"].squeeze() / share, self.energy))
        self._news = {name: arrived[name].squeeze() / share for name in self.dictionary.news}
        self._news["fired"] = arrived["fired"].sum() / arrived["rows"].squeeze()
        along = self.dictionary.remove_parallel_gradient()
        if self._resizes:
            self._news["along"] = along / share
        return flags

    @torch.no_grad()
    def settle(self, step: int, optimizer: torch.optim.Optimizer, group: Group = ALONE) -> None:
        """After the optimiser's step: thresholds follow L0, constraints, new lives for dead latents.

        Where the optimiser was kept from its step, nothing of that.
        """
        broken = getattr(optimizer, "found_inf", None)
        self._hear(broken)
        self.dictionary.constrain()
        if self.near_start is not None:
            self.near_start.bring_back(self.dictionary.W_dec)
        if self._residual is not None:
            residual, self._residual = self._residual, None
            if broken is None or not broken > 0:
                seed = (int(self.seed) * 1_000_003 + step) % 2**63
                interval = self.recipe.resampling_interval(self.planned_steps) * self.tokens_per_step
                after = self.recipe.dead_after_tokens or min(self.dead_latents.dead_after_tokens, interval)
                resample(self.dictionary, self.dead_latents, after, residual, optimizer, seed, group)
        if self.averages is not None:
            self.averages.update(self.dictionary)

    def _hear(self, broken: Tensor | None) -> None:
        news, self._news = self._news, {}
        if broken is not None:  # without a wait for the device
            news = {name: torch.where(broken > 0, torch.nan, value) for name, value in news.items()}
        l0, along = news.pop("fired", None), news.pop("along", None)
        if self.sparsity is not None and l0 is not None:
            self.sparsity.update(l0, self.dictionary.l0_factor)
        if news:
            self.dictionary.hear(news)
        if along is not None:
            assert isinstance(self.dictionary, LinearEncoder)  # `Controls` has seen to it
            self.dictionary.resize_latents(common_factor(along))

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the dictionary has the weights that are scored and saved."""
        return nullcontext() if self.averages is None else self.averages.used_in(self.dictionary)

    def keep_averages(self) -> None:
        """Gives the dictionary these weights for good."""
        if self.averages is not None:
            self.averages.copy_into(self.dictionary)

    def _turn(self, step: int, rows: int, device: torch.device) -> Tensor | None:
        if "minfire" not in self.ways:
            return None
        budget = rows * self._l0_asked
        return whose_turn(step, self.planned_steps, self.dictionary.n_latents, budget, device)

    @property
    def _l0_asked(self) -> float:
        dictionary = self.dictionary
        return float(getattr(dictionary, "k", None) or getattr(dictionary, "target_l0", None) or 1.0)

    def _resamples_after(self, step: int) -> bool:
        if "resample" not in self.ways or step + 1 > 0.9 * self.planned_steps:
            return False
        return (step + 1) % self.recipe.resampling_interval(self.planned_steps) == 0

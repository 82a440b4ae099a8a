"""The LightningModule: one dictionary, its loss and its optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning
import torch
from jaxtyping import Float64
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from sae.dictionaries import SparseAutoencoder
from sae.errors import DivergedError, InputError, RunError
from sae.ops.group import Group
from sae.ops.metrics import ReconstructionMetrics, ReconstructionScores
from sae.training.dead_latents import DeadLatents, count_firings
from sae.training.host_reading import HostReading, Moment
from sae.training.losses import auxk_loss, reconstruction_loss
from sae.training.riders import GradientRiders
from sae.training.rows import Rows, RowSource
from sae.training.schedules import learning_rate_for_width, warmup_then_decay

RIDERS_BESIDE_LATENTS = 6
"""Numbers that ride on the gradients besides one for each latent."""
_PRECISIONS = ("32-true", "bf16-mixed", "64-true")


class SparseAutoencoderModule(lightning.LightningModule):
    """Trains a dictionary on rows of an activation cache.

    loss = reconstruction + auxk_coefficient * AuxK, with Adam, linear warm-up, and decay to zero over
    the end of the run. W_dec's rows are brought back to unit norm after every optimiser step; the part
    of their gradient that this would undo is removed before it.

    Several ranks that share a batch train as one rank on the whole of it. What they have to know of each
    other rides on the gradients (`GradientRiders`): which latents fired, whether the loss is finite, whether
    one of them was asked to stop. Only steps that log do a collective of their own.
    """

    dictionary: SparseAutoencoder
    dead_latents: DeadLatents
    riders: GradientRiders
    energy: Tensor

    def __init__(
        self,
        dictionary: Callable[[int], SparseAutoencoder],
        lr: float | None = None,
        warmup_steps: int = 100,
        decay_share: float = 0.2,
        auxk_coefficient: float = 1 / 32,
        dead_after_tokens: int | None = None,
    ) -> None:
        """Describes the training; the dictionary is built once the width of the data is known.

        Args:
            dictionary: the kind with its arguments; called with d_model.
            lr: Adam's rate; null = the recipe's rule, 2e-4 * sqrt(2^14 / n_latents).
            warmup_steps: steps of linear rise from zero.
            decay_share: share of the run over which the rate falls to zero.
            auxk_coefficient: weight of the loss that revives dead latents; 0 = off.
            dead_after_tokens: tokens without firing after which a latent counts as dead; null = 5 % of
                the run, at most 10 million.

        Raises:
            InputError: for a value out of range.
        """
        super().__init__()
        for name, value, rule, good in (
            ("lr", lr, "positive", lr is None or lr > 0),
            ("warmup_steps", warmup_steps, "at least 0", warmup_steps >= 0),
            ("decay_share", decay_share, "in [0, 1]", 0 <= decay_share <= 1),
            ("auxk_coefficient", auxk_coefficient, "at least 0", auxk_coefficient >= 0),
            (
                "dead_after_tokens",
                dead_after_tokens,
                "positive",
                dead_after_tokens is None or dead_after_tokens > 0,
            ),
        ):
            if not good:
                raise InputError(f"`{name}` must be {rule}, got {name}={value}.")
        self.make_dictionary = dictionary
        self._lr = lr
        self._warmup_steps = warmup_steps
        self._decay_share = decay_share
        self.auxk_coefficient = auxk_coefficient
        self._dead_after_tokens = dead_after_tokens
        self._scores: ReconstructionScores | None = None
        self._densities: Tensor | None = None
        self._held_out: ReconstructionMetrics | None = None
        self.asked_to_stop = self.asked_to_requeue = False
        """Whether this rank was asked, by a signal; it tells the others with the next step."""
        self.stopping = self.requeueing = False
        """Whether any rank was asked: the same on all of them, at the same step."""

    @property
    def rows(self) -> RowSource:
        """The datamodule."""
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def scores(self) -> ReconstructionScores | None:
        """Held-out scores of the last validation or test; None before the first."""
        return self._scores

    @property
    def densities(self) -> Float64[Tensor, " n_latents"] | None:
        """Share of held-out rows on which each latent fired in the last validation or test; None before."""
        return self._densities

    @property
    def lr(self) -> float:
        """Adam's rate at its peak: as given, or the recipe's rule."""
        return self._lr or learning_rate_for_width(self.dictionary.n_latents)

    def check_dictionary(self) -> None:
        """Raises `InputError` for a dictionary that cannot be built, without data and without memory."""
        with torch.device("meta"):
            self.make_dictionary(1)

    @staticmethod
    def check_trainer(trainer: lightning.Trainer) -> None:
        """Raises `InputError` for settings of the Trainer that this training cannot be run with."""
        if trainer.precision not in _PRECISIONS:
            raise InputError(
                f"`trainer.precision` {trainer.precision} is not supported (weights stay in full precision);"
                f" use {', '.join(_PRECISIONS)}."
            )
        if trainer.log_every_n_steps < 1:
            raise InputError(
                f"`trainer.log_every_n_steps` must be at least 1, got {trainer.log_every_n_steps};"
                " `trainer.logger=false` logs nothing."
            )
        if trainer.max_steps == -1 and trainer.max_epochs in (None, -1):
            raise InputError(
                "`trainer.max_steps` or `trainer.max_epochs` must be given: the schedule needs an end."
            )

    @property
    def tokens_per_step(self) -> int:
        """Rows that one optimiser step sees, over all ranks; fewer where a pass ends within it."""
        return self.rows.batch_size * self.trainer.accumulate_grad_batches

    def configure_model(self) -> None:
        """Builds the dictionary for the data's width, centred and scaled by the data's statistics."""
        if hasattr(self, "dictionary"):
            return
        self.check_trainer(self.trainer)
        with torch.random.fork_rng(devices=[]):
            # Start from the run's seed, whatever a harvest before this has drawn from the generator.
            torch.manual_seed(torch.initial_seed())
            self.dictionary = self.make_dictionary(self.rows.d_model)
        moments = self.rows.moments
        self.dictionary.set_input_statistics(moments.mean, moments.mean_squared_norm)
        n_latents = self.dictionary.n_latents
        self.dead_latents = DeadLatents(n_latents, self._dead_after_tokens or 1)
        self.riders = GradientRiders(fired=n_latents, energy=1, batches=1, asked=2, broken=2)
        self.register_buffer("energy", torch.ones(()))  # mean square of the residual at the last step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says of what kind the dictionary is."""
        checkpoint["dictionary"] = self._describe()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises `InputError` for the checkpoint of another dictionary."""
        found, mine = checkpoint.get("dictionary"), self._describe()
        if found != mine:
            raise InputError(
                f"the checkpoint is of {found}, this run trains {mine}; start over with `--fresh`."
            )

    def _describe(self) -> str:
        return f"{type(self.dictionary).__name__}({self.dictionary.extra_repr()})"

    def on_fit_start(self) -> None:
        """Settles after how many tokens a latent counts as dead."""
        planned = int(self.trainer.estimated_stepping_batches) * self.tokens_per_step
        after = self._dead_after_tokens or max(1, min(10_000_000, planned // 20))
        self.dead_latents.dead_after_tokens = after
        self._flags, self._not_asked = torch.zeros(4, device=self.device), torch.zeros(2, device=self.device)
        self._host = HostReading(late=self.device.type == "cuda")

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        """The loss of one batch, of this rank's share of it; on logging steps also its parts."""
        u = self.dictionary.normalise(batch.x)
        code = self.dictionary.training_code(u)
        residual = u - self.dictionary.decode_normalised(code.latents)
        reconstruction = loss = reconstruction_loss(residual)
        dead = self.dead_latents.ids
        auxk = None
        if self.auxk_coefficient > 0 and len(dead) > 0:
            auxk = auxk_loss(self.dictionary, u, residual, code, dead, self.energy)
            loss = loss + self.auxk_coefficient * auxk
        fired = count_firings(code.latents, self.dictionary.n_latents)
        if self._logs_now:
            self._log_batch(u, reconstruction, fired.sum() / len(u), auxk)
        broken = torch.stack([~loss.isfinite(), ~u.sum().isfinite()])
        asked = self._not_asked
        if self.asked_to_stop:  # the copy to the device is made only then
            asked = torch.tensor([1.0, float(self.asked_to_requeue)], device=u.device)
        one = torch.ones_like(reconstruction)
        return loss + self.riders.board(
            fired=fired, energy=reconstruction, batches=one, asked=asked, broken=broken
        )

    def _log_batch(self, u: Tensor, reconstruction: Tensor, l0: Tensor, auxk: Tensor | None) -> None:
        """Logs what one rank would have found on the whole batch."""
        parts = [reconstruction, u.square().mean(), l0, *([] if auxk is None else [auxk])]
        means = torch.cat([torch.stack(parts).detach().float(), u.mean(0).float()])
        means = self.trainer.strategy.reduce(means, reduce_op="mean")
        error, square, l0 = means[:3]
        about_mean = square - means[len(parts) :].square().mean()  # of these rows, as everywhere
        self.log("train/fvu", error / about_mean, prog_bar=True)
        self.log("train/l0", l0)
        if auxk is not None:
            self.log("train/auxk", means[3])
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    @property
    def _logs_now(self) -> bool:
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes what came with the gradients, and from W_dec's what restoring unit norm would undo."""
        arrived = self.riders.arrive()
        share = arrived["batches"].squeeze()  # below 1 where a pass ends within an accumulated step
        tokens = (share * self.tokens_per_step).round().long()
        self.dead_latents.update(arrived["fired"] > 0, tokens, self.global_step)
        self.energy.copy_(arrived["energy"].squeeze() / share)
        if self._logs_now:
            self.log("train/dead_fraction", self.dead_latents.fraction(), prog_bar=True)
        # Once broken, always: until the host has seen it, no step may touch the weights.
        flags = torch.cat([arrived["asked"].nan_to_num(0.0), arrived["broken"].nan_to_num(1.0)])
        self._flags = flags + self._flags
        self.dictionary.remove_parallel_gradient()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the Trainer's settings; Lightning's own way refuses fused optimisers in bf16.

        Whatever is clipped, a gradient that is not finite keeps the optimiser from this step.
        """
        parameters = list(self.dictionary.parameters())
        if gradient_clip_val and gradient_clip_algorithm != "value":
            norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
            if gradient_clip_val:
                torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        self._flags[2] += ~norm.isfinite()
        optimizer.found_inf = (self._flags[2] > 0).float()  # pyright: ignore[reportAttributeAccessIssue]
        if self._logs_now:
            self.log("train/grad_norm", norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, unless something is not finite; then unit norm.

        Raises:
            DivergedError: where it is not; on a GPU one step later, the weights untouched since.
        """
        super().optimizer_step(*args, **kwargs)
        self.dictionary.restore_unit_norm()
        now = Moment(self.global_step, self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1)
        self._heed(self._host.of(now, self._flags))

    def catch_up(self) -> None:
        """Looks at the last step too, where that has not been done yet; raises as `optimizer_step`."""
        self._heed(self._host.last())

    on_train_end = catch_up

    def _heed(self, read: tuple[Moment, list[float]] | None) -> None:
        """Acts on the flags of a step."""
        if read is None:
            return
        moment, (stop, requeue, broken, broken_rows) = read
        self.stopping, self.requeueing = stop > 0, requeue > 0
        if broken > 0:
            why = (
                "that batch has rows that are not finite: look for damage in the cache with"
                " `scripts/cache_activations.py --verify`"
                if broken_rows > 0
                else f"its rows are finite, so training diverged: lower `model.lr`, it was {self.lr:.3g}"
            )
            raise DivergedError(
                f"the loss or its gradient is not finite at step {moment.step + 1:,} (batch {moment.batch:,}"
                f" in the order of seed {torch.initial_seed()}, counted from 0); {why}."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Fused Adam and the schedule."""
        optimizer = torch.optim.Adam(self.dictionary.parameters(), lr=self.lr, betas=(0.9, 0.999), fused=True)
        max_steps = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            return warmup_then_decay(
                step, warmup_steps=self._warmup_steps, max_steps=max_steps, decay_share=self._decay_share
            )

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        """Empties the held-out sums."""
        self._held_out = ReconstructionMetrics(self.dictionary.n_latents, self.rows.moments.mean)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Rows, batch_idx: int) -> None:
        """Adds a held-out batch."""
        assert self._held_out is not None
        x = batch.x.to(self.dictionary.W_dec.dtype)
        x_hat, latents = self.dictionary(x)
        self._held_out.add(x, x_hat, latents, None if batch.position is None else batch.position == 0)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out scores under `val/`."""
        self._finish_scores("val")

    def on_test_epoch_end(self) -> None:
        """Logs the held-out scores under `test/`."""
        self._finish_scores("test")

    def _finish_scores(self, stage: str) -> None:
        assert self._held_out is not None
        self._held_out.merge(Group.of_training(self.device))
        self._scores, self._densities = self._held_out.compute(), self._held_out.densities
        if self._scores.fvu is not None and not math.isfinite(self._scores.fvu):
            error = RunError(
                f"the held-out FVU is {self._scores.fvu} at step {self.global_step:,}: training diverged;"
                f" lower `model.lr`, it was {self.lr:.3g}."
            )
            error.on_all_ranks = True
            raise error
        known = {name: value for name, value in self._scores._asdict().items() if value is not None}
        # The ranks agree already; Lightning wants it said.
        self.log_dict({f"{stage}/{name}": value for name, value in known.items()}, sync_dist=True)
        self.log("step", float(self.global_step), sync_dist=True)  # else Lightning draws them one step early

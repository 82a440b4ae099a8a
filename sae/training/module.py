"""The LightningModule: dictionaries that learn from the same batches, their losses and their optimiser."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from sae.dictionaries import SparseAutoencoder
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.heap import give_back, keep_freed_memory
from sae.ops.metrics import ReconstructionScores
from sae.training.beginning import Beginning, Start
from sae.training.controls import AskedControls, Controls
from sae.training.dead_latents import DeadLatents
from sae.training.divergence import clip_gradients, scores_not_finite, step_not_finite
from sae.training.held_out import HeldOut
from sae.training.host_reading import HostReading, Moment
from sae.training.learner import Learner
from sae.training.names import SINGLE, Make, check_described, curve, described, named
from sae.training.pace import Pace
from sae.training.recipe import Recipe
from sae.training.revival import Way
from sae.training.rows import Rows, RowSource
from sae.training.target_l0 import AskedL0, TargetL0
from sae.training.trainer_settings import check_trainer


class SparseAutoencoderModule(lightning.LightningModule):
    """Trains a dictionary, or several at once, on rows of an activation cache.

    loss = the kind's reconstruction, penalty and other terms, and what revives dead latents (`Learner`),
    with Adam, linear warm-up, and decay to zero over the end of the run. W_dec's rows are brought back to
    unit norm after every optimiser step; the part of their gradient that this would undo is taken off.

    Several dictionaries share the batches and nothing else: each has its learner, its clipping and its rate,
    so it becomes what it would be alone, bit for bit. One that diverges ends the run of all.

    Several ranks that share a batch train as one rank on the whole of it. What they have to know of each
    other rides on the gradients (`GradientRiders`): which latents fired, whether the loss is finite, whether
    one of them was asked to stop. Only steps that log do a collective of their own, and kinds whose choice
    of latents is one over the whole batch.
    """

    def __init__(
        self,
        dictionary: Make | None = None,
        lr: float | None = None,
        warmup_steps: int = 100,
        decay_share: float = 0.2,
        revival: list[Way] | None = None,
        auxk_coefficient: float = 1 / 32,
        pre_act_coefficient: float = 0.01,
        resample_every: int | None = None,
        dead_after_tokens: int | None = None,
        l0_start: float | None = None,
        start: Start = "sphere",
        whiten: bool = False,
        init_from: str | None = None,
        ema_decay: float | None = None,
        row_sparse_adam: bool = False,
        target_l0: AskedL0 = None,
        dictionaries: dict[str, Make] | None = None,
        controls: AskedControls = None,
    ) -> None:
        """Describes the training; dictionaries are built once the width of the data is known.

        Args:
            dictionary: the kind with its arguments; called with d_model.
            lr: Adam's rate; null = the recipe's rule, see `learning_rate_for`.
            warmup_steps: steps of linear rise from zero.
            decay_share: share of the run over which it falls to zero.
            revival: of dead latents, by some of auxk, pre_act, resample, minfire; null = best for the kind.
            auxk_coefficient: weight of the loss that lets dead latents explain the residual.
            pre_act_coefficient: weight of the loss that lifts dead latents until they fire.
            resample_every: steps between two resamplings; null = a two-hundredth of the run, at most 2,500.
            dead_after_tokens: tokens without firing until a latent is dead; null = see `Recipe`.
            l0_start: L0 at the first step over that at the end; null = best for the kind, 1 with init_from.
            start: directions begin at random on the sphere, or (subspace) as random as the data itself.
            whiten: the encoder sees rows of equal variance in all directions, and the loss measures so.
            init_from: run or dictionary folder whose weights to begin with.
            ema_decay: score and save a running mean of the weights that keeps this share at each step.
            row_sparse_adam: Adam skips latents without a part in a step; pays where few of many fire.
            target_l0: latents per row, where the dictionary leaves them out; auto = from the data.
            dictionaries: several kinds with their arguments by name, instead of `dictionary`.
            controls: what keeps its random start: decoder, soft_decoder or encoder; of several, by name.

        Raises:
            InputError: for a value out of range.
        """
        super().__init__()
        self.pace = Pace(lr, warmup_steps, decay_share, ema_decay, row_sparse_adam)
        ways = None if revival is None else tuple(revival)
        l0_start = 1.0 if l0_start is None and init_from is not None else l0_start
        losses = (auxk_coefficient, pre_act_coefficient)
        self.recipe = Recipe(ways, *losses, resample_every, dead_after_tokens, l0_start)
        self.beginning, self.target_l0 = Beginning(start, whiten, init_from), TargetL0(target_l0)
        for settings in (self.pace, self.recipe, self.beginning):
            settings.check()
        self.makes = self.target_l0.filled_all(named(dictionary, dictionaries))
        self.controls = Controls(controls).checked(self.makes, self.recipe)
        self.learners, self.held_out = nn.ModuleDict(), HeldOut()
        self._with_averages, self._group, self.planned_steps = ExitStack(), ALONE, 0
        self.asked_to_stop = self.asked_to_requeue = self.stopping = self.requeueing = False

    @property
    def each(self) -> dict[str, Learner]:
        """The learners by name; empty before the width of the data is known."""
        return cast("dict[str, Learner]", dict(self.learners.items()))

    @property
    def dictionaries(self) -> dict[str, SparseAutoencoder]:
        """What is trained, by name."""
        return {name: learner.dictionary for name, learner in self.each.items()}

    @property
    def learner(self) -> Learner:
        """The only one; `each` has several."""
        if list(self.makes) != [SINGLE]:
            raise InputError(f"this run trains {', '.join(self.makes)}; ask for one of them by name.")
        return self.each[SINGLE]

    @property
    def dictionary(self) -> SparseAutoencoder:
        """The only one that is trained; `dictionaries` has several."""
        return self.learner.dictionary

    @property
    def dead_latents(self) -> DeadLatents:
        """Counters of the latents of the only one."""
        return self.learner.dead_latents

    @property
    def rows(self) -> RowSource:
        """The datamodule."""
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def scores(self) -> ReconstructionScores | None:
        """Held-out scores of the only one in the last validation or test; None before the first."""
        return self.held_out.scores.get(SINGLE)

    def lr_of(self, name: str) -> float:
        """Adam's rate at its peak."""
        return self.pace.lr_of(self.each[name].dictionary, self.planned_steps)

    def check_dictionary(self) -> None:
        """Raises `InputError` for a dictionary that cannot be built, without data and without memory."""
        with torch.device("meta"):
            self.build(1)

    def build(self, d_model: int) -> dict[str, SparseAutoencoder]:
        """Fresh dictionaries by name; raises `InputError` for a kind that does not go with its control."""
        built = {}
        for name, make in self.makes.items():
            with torch.random.fork_rng(devices=[]):
                # Each from the run's seed, whatever a harvest or another one has drawn from the generator.
                torch.manual_seed(torch.initial_seed())
                built[name] = make(d_model)
            self.controls.recipe_of(name, built[name], self.recipe)
        return built

    @property
    def tokens_per_step(self) -> int:
        """Rows that one optimiser step sees, over all ranks; fewer where a pass ends within it."""
        return self.rows.batch_size * self.trainer.accumulate_grad_batches

    def configure_model(self) -> None:
        """Builds the dictionaries for the data's width, centred and scaled by the data's statistics."""
        if self.learners:
            return
        check_trainer(self.trainer)
        for name, dictionary in self.build(self.rows.d_model).items():
            recipe = self.controls.recipe_of(name, dictionary, self.recipe)
            self.beginning.begin(dictionary, self.rows, recipe)
            self.learners[name] = Learner(dictionary, recipe, self.pace.ema_decay, self.controls.of(name))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says of what kinds the dictionaries are."""
        checkpoint["dictionary"] = described(self.dictionaries)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises `InputError` for the checkpoint of other dictionaries."""
        check_described(checkpoint.get("dictionary"), self.dictionaries)

    def on_fit_start(self) -> None:
        """Settles what depends on the length of the run."""
        if self.device.type == "cpu":
            keep_freed_memory()
        for learner in self.each.values():
            learner.plan(int(self.trainer.estimated_stepping_batches), self.tokens_per_step)
        self._flags = torch.zeros(len(self.learners), 5, device=self.device)
        self._host = HostReading(late=self.device.type == "cuda")
        self._group = Group.of_training(self.device)

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        """The loss of one batch, of this rank's share of it; on logging steps also its parts."""
        asked = None
        if self.asked_to_stop:  # the copy to the device is made only then
            asked = torch.tensor([1.0, float(self.asked_to_requeue)], device=batch.x.device)
        totals = []
        for name, learner in self.each.items():
            u = learner.dictionary.normalise(batch.x)
            losses = learner.loss(u, self.global_step, asked, self._group)
            if self._logs_now:
                self._log_batch(name, u, losses.residual.detach(), losses.parts)
            totals.append(losses.total)
        return sum(totals[1:], totals[0])

    def _log_batch(self, of: str, u: Tensor, residual: Tensor, parts: dict[str, Tensor]) -> None:
        """Logs what one rank would have found on the whole batch."""
        sums = [residual.square().mean(), u.square().mean(), *parts.values()]
        means = torch.cat([torch.stack([value.float() for value in sums]), u.mean(0).float()])
        means = self.trainer.strategy.reduce(means, reduce_op="mean")
        error, square = means[:2]
        about_mean = square - means[len(sums) :].square().mean()  # of these rows, as everywhere
        self.log(curve("train", of, "fvu"), error / about_mean, prog_bar=True)
        for name, value in zip(parts, means[2:], strict=False):
            self.log(curve("train", of, name), value)
        group = self.trainer.optimizers[0].param_groups[list(self.learners).index(of)]
        self.log(curve("train", of, "lr"), group["lr"])

    @property
    def _logs_now(self) -> bool:
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes what came with the gradients, and from W_dec's what restoring unit norm would undo."""
        # Once broken, always: until the host has seen it, no step may touch the weights.
        arrived = [learner.arrive(self.global_step) for learner in self.each.values()]
        self._flags = torch.stack(arrived) + self._flags
        if self._logs_now:
            for name, learner in self.each.items():
                dead = learner.dead_latents.fraction()
                self.log(curve("train", name, "dead_fraction"), dead, prog_bar=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each dictionary's; Lightning's own way refuses fused optimisers in bf16.

        Whatever is clipped, a gradient that is not finite keeps the optimiser from this step.
        """
        for flags, (name, dictionary) in zip(self._flags, self.dictionaries.items(), strict=True):
            norm = clip_gradients(list(dictionary.parameters()), gradient_clip_val, gradient_clip_algorithm)
            flags[2] += ~norm.isfinite()
            if self._logs_now:
                self.log(curve("train", name, "grad_norm"), norm)
        optimizer.found_inf = (self._flags[:, 2] > 0).any().float()  # pyright: ignore[reportAttributeAccessIssue]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, unless something is not finite; then unit norm.

        Raises:
            DivergedError: where it is not; on a GPU one step later, the weights untouched since.
        """
        step = self.global_step  # the optimiser's step counts itself
        super().optimizer_step(*args, **kwargs)
        optimizer = self.trainer.optimizers[0]
        for learner in self.each.values():
            learner.settle(step, optimizer, self._group)
        now = Moment(self.global_step, self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1)
        self._heed(self._host.of(now, self._flags.flatten()))

    def averaged(self) -> AbstractContextManager[Any]:
        """Within it the dictionaries have the weights that are scored and saved."""
        stack = ExitStack()
        for learner in self.each.values():
            stack.enter_context(learner.averaged())
        return stack

    def catch_up(self) -> None:
        """Looks at the last step too, where that has not been done yet; raises as `optimizer_step`."""
        self._heed(self._host.last())

    def on_train_end(self) -> None:
        """Looks at the last step, and returns the memory that was kept for a next one."""
        self.catch_up()
        if self.device.type == "cpu":
            give_back()

    def _heed(self, read: tuple[Moment, list[float]] | None) -> None:
        """Acts on the flags of a step."""
        if read is None:
            return
        moment, numbers = read
        of_each = [numbers[i : i + 5] for i in range(0, len(numbers), 5)]
        # The ranks' wishes ride with every dictionary; those of the first will do.
        self.stopping, self.requeueing = of_each[0][0] > 0, of_each[0][1] > 0
        for name, (_, _, broken, rows, thresholds) in zip(self.learners, of_each, strict=True):
            if broken > 0:
                raise step_not_finite(name, moment, rows > 0, thresholds > 0, self.lr_of(name))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Fused Adam, with a rate for each dictionary, and the schedule."""
        self.planned_steps = steps = int(self.trainer.estimated_stepping_batches)
        optimizer = self.pace.adam(self.dictionaries.values(), steps)
        scheduler = self.pace.schedule(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        """Empties the held-out sums."""
        self.held_out.begin(self.dictionaries, self.rows.moments.mean)
        self._with_averages.enter_context(self.averaged())

    def on_test_epoch_start(self) -> None:
        """The same; averaged weights stay from here on."""
        self.held_out.begin(self.dictionaries, self.rows.moments.mean)
        for learner in self.each.values():
            learner.keep_averages()

    def validation_step(self, batch: Rows, batch_idx: int) -> None:
        """Adds a held-out batch."""
        self.held_out.add(self.dictionaries, batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out scores under `val/`."""
        self._with_averages.close()
        self._finish_scores("val")

    def on_test_epoch_end(self) -> None:
        """Logs the held-out scores under `test/`."""
        self._finish_scores("test")

    def _finish_scores(self, stage: str) -> None:
        self.held_out.end(Group.of_training(self.device))
        if (name := self.held_out.diverged) is not None:
            fvu = self.held_out.scores[name].fvu
            raise scores_not_finite(name, fvu, self.global_step, self.lr_of(name))
        for name, scores in self.held_out.scores.items():
            known = {quantity: value for quantity, value in scores._asdict().items() if value is not None}
            # The ranks agree already; Lightning wants it said.
            self.log_dict({curve(stage, name, key): value for key, value in known.items()}, sync_dist=True)
        self.log("step", float(self.global_step), sync_dist=True)  # else Lightning draws them one step early

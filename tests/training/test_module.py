"""Training: recovery of planted directions, exact resume, unit norm, what is logged."""

import lightning
import pytest
import torch

from sae.activations import ActivationDataModule
from sae.activations.exchange.imported import import_rows
from sae.activations.synthetic import PlantedWorld
from sae.dictionaries import TopK
from sae.errors import DivergedError, InputError, RunError
from sae.ops import selection
from sae.ops.geometry import mean_max_cosine
from sae.training import SparseAutoencoderModule


def _trainer(tmp_path, max_steps, **kwargs):
    return lightning.Trainer(
        **{
            "max_steps": max_steps,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            "gradient_clip_val": 1.0,
        }
        | kwargs
    )


def _topk(n_latents, k):
    return lambda d_model: TopK(d_model, n_latents, k)


@pytest.fixture(scope="module")
def world_cache(tmp_path_factory):
    return import_rows(
        PlantedWorld(24, 12, active=2, max_cosine=0.6).sample(4000).x, tmp_path_factory.mktemp("w") / "cache"
    )


def _fit(cache, tmp_path, max_steps, module=None, batch_size=256, ckpt_path=None, seed=0, **kwargs):
    lightning.seed_everything(seed, verbose=False)
    module = module or SparseAutoencoderModule(_topk(32, 2), warmup_steps=5, dead_after_tokens=600)
    data = ActivationDataModule(str(cache.location), batch_size=batch_size)
    trainer = _trainer(tmp_path, max_steps, **kwargs)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


@pytest.mark.slow
def test_planted_dictionary_is_recovered(tmp_path):
    """256 directions in 64 dimensions, 3 active, 300,000 rows: found to a mean max cosine of 0.97."""
    world = PlantedWorld(256, 64, active=3, max_cosine=0.5)
    cache = import_rows(world.sample(300_000).x, tmp_path / "cache", held_out=0.01)
    module = SparseAutoencoderModule(_topk(256, 3), lr=2e-3, warmup_steps=100)
    _fit(cache, tmp_path, 3000, module, batch_size=1024, limit_val_batches=0)
    found = mean_max_cosine(world.directions, module.dictionary.directions.detach())
    at_random = mean_max_cosine(world.directions, TopK(64, 256, 3).directions.detach())
    print(f"mean max cosine {found:.4f}, of random directions {at_random:.4f}")
    assert found >= 0.97 and at_random < 0.5


@pytest.mark.shapes_unchecked
def test_loss_falls_and_directions_stay_unit_rows(world_cache, tmp_path):
    module, trainer = _fit(world_cache, tmp_path, 150, module=SparseAutoencoderModule(_topk(32, 2), lr=3e-3))
    trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    assert module.scores.fvu < 0.35 and module.scores.l0 <= 2
    torch.testing.assert_close(module.dictionary.directions.norm(dim=1), torch.ones(32), rtol=1e-5, atol=1e-5)


@pytest.mark.shapes_unchecked
def test_interrupted_and_resumed_run_ends_with_the_same_weights(world_cache, tmp_path):
    unbroken, _ = _fit(world_cache, tmp_path, 60)
    checkpoint = tmp_path / "middle.ckpt"

    class Interrupt(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 37:
                trainer.save_checkpoint(checkpoint)
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        _fit(world_cache, tmp_path, 60, callbacks=[Interrupt()])
    resumed, trainer = _fit(world_cache, tmp_path, 60, ckpt_path=checkpoint)
    assert trainer.global_step == 60
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_same_seed_same_weights_and_another_seed_other_weights(world_cache, tmp_path):
    first, again = (_fit(world_cache, tmp_path, 12)[0].dictionary.W_dec for _ in range(2))
    other = _fit(world_cache, tmp_path, 12, seed=1)[0].dictionary.W_dec
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.slow
def test_dead_latents_come_back_through_auxk_and_not_without_it(world_cache, tmp_path):
    class KillHalf(lightning.Callback):
        def on_fit_start(self, trainer, module):
            with torch.no_grad():
                module.dictionary.b_enc[16:] = -2.0

    def dead_after(coefficient):
        module = SparseAutoencoderModule(
            _topk(32, 2), lr=3e-3, warmup_steps=0, auxk_coefficient=coefficient, dead_after_tokens=1000
        )
        _fit(world_cache, tmp_path, 300, module, callbacks=[KillHalf()])
        return float(module.dead_latents.fraction())

    without, revived = dead_after(0.0), dead_after(1 / 32)
    assert without >= 0.1 and revived <= without / 3, (without, revived)


def test_bf16_mixed_trains_with_float32_weights(world_cache, tmp_path):
    module, _ = _fit(
        world_cache,
        tmp_path,
        100,
        module=SparseAutoencoderModule(_topk(32, 2), lr=3e-3),
        precision="bf16-mixed",
    )
    assert module.dictionary.W_dec.dtype == torch.float32
    reference, _ = _fit(world_cache, tmp_path, 100, module=SparseAutoencoderModule(_topk(32, 2), lr=3e-3))
    x = torch.cat([batch.x for batch in world_cache.batches("held_out", "acts", 512)])
    error = lambda m: (m.dictionary(x).x_hat - x).square().sum().item()  # noqa: E731
    assert error(reference) < 0.5 * (x - x.mean(0)).square().sum()
    assert error(module) == pytest.approx(error(reference), rel=0.1)


class _HostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes operations whose result, or its size, the host has to wait for on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.seen.add(name)
        boolean_index = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAITING or boolean_index:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_quiet_steps_never_wait_for_the_device(world_cache, tmp_path, monkeypatch):
    """Forward, backward, clipping, optimiser and counters; only the list of dead latents is read.

    Latents are chosen here as on a GPU; a CPU's own way looks at numbers, and nobody waits for them.
    """
    monkeypatch.setenv("SAE_KERNELS", "off")
    monkeypatch.setattr(selection, "largest", lambda matrix, k: matrix.topk(k, dim=1))
    steps = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.mode = _HostReads()
            self.mode.__enter__()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.mode.__exit__(None, None, None)
            steps.append(self.mode)

    _fit(world_cache, tmp_path, 30, callbacks=[Watch()], log_every_n_steps=50, limit_val_batches=0)
    assert {"topk", "_embedding_bag", "_fused_adam_"} <= set.union(*(mode.seen for mode in steps))
    waiting = [index for index, mode in enumerate(steps) if mode.found]
    assert [found for mode in steps for found in mode.found] == ["nonzero"] * len(waiting)
    assert waiting == [0, 10, 20]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_low_precision_are_refused(world_cache, tmp_path, precision):
    with pytest.raises(InputError, match=f"`trainer.precision` {precision} is not supported .* use 32-true"):
        _fit(world_cache, tmp_path, 3, precision=precision)


def test_training_without_an_end_is_refused(world_cache, tmp_path):
    with pytest.raises(InputError, match="the schedule needs an end"):
        _fit(world_cache, tmp_path, -1, max_epochs=-1)


def test_diverged_training_names_step_and_batch_and_keeps_the_weights_before(world_cache, tmp_path):
    module = SparseAutoencoderModule(_topk(32, 2), lr=1e30, warmup_steps=0)
    told = (
        r"not finite at step (\d+) \(batch \d+ .* its rows are finite, so .* lower `model.lr`, it was 1e\+30"
    )
    with pytest.raises(DivergedError, match=told):
        _fit(world_cache, tmp_path, 14, module, gradient_clip_val=None)
    assert all(parameter.isfinite().all() for parameter in module.dictionary.parameters())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lr": 0.0}, "`lr` must be positive and finite, got lr=0.0"),
        ({"warmup_steps": -1}, "`warmup_steps` must be at least 0"),
        ({"decay_share": 1.5}, r"`decay_share` must be in \[0, 1\]"),
        ({"auxk_coefficient": -1.0}, "`auxk_coefficient` must be at least 0"),
        ({"dead_after_tokens": 0}, "`dead_after_tokens` must be positive"),
    ],
)
def test_values_out_of_range_are_errors(arguments, match):
    with pytest.raises(InputError, match=match):
        SparseAutoencoderModule(_topk(8, 2), **arguments)


def test_a_held_out_score_that_is_not_finite_ends_the_run(world_cache, tmp_path):
    class Overflow(lightning.Callback):
        def on_validation_start(self, trainer, module):
            with torch.no_grad():
                module.dictionary.b_dec.fill_(float("inf"))

    with pytest.raises(RunError, match=r"the held-out FVU is (nan|inf) at step 5: training diverged; lower"):
        _fit(world_cache, tmp_path, 9, callbacks=[Overflow()], val_check_interval=5)

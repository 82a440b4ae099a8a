"""Plans: sums by hand, sizes beside measured ones, and what is refused before anything is paid for."""

import importlib.util
import logging
import math
import sys
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from support.laws import KINDS

from sae.activations import ActivationDataModule, Source
from sae.activations.cache.places import LocalPlace
from sae.activations.exchange.imported import import_rows
from sae.activations.language_model import find_blocks, load_language_model
from sae.activations.model_size import model_size
from sae.callbacks import NMFBaseline
from sae.cli import SaeCLI
from sae.dictionaries import BatchTopK, Dictionary, JumpReLU, ReLU, TopK
from sae.errors import InputError
from sae.planning import Step, memory_of, plan_run
from sae.planning.speed import Span, format_seconds, ring_bytes
from sae.training import SparseAutoencoderModule

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "measure_plan.py"
_SPEC = importlib.util.spec_from_file_location("measure_plan", SCRIPT)
measure_plan = importlib.util.module_from_spec(_SPEC)
sys.modules["measure_plan"] = measure_plan
_SPEC.loader.exec_module(measure_plan)

STEP = Step(
    rows=16, held_out_rows=1, d_model=4, n_latents=8, entries=2, revived=0, weights=76, largest=32,
    buffers=5, precision="32-true", row_element=4, holds_gradients=False,
)  # fmt: skip


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Plans a run on the demo model, in an empty folder; arguments by their usual names."""
    monkeypatch.chdir(tmp_path)

    def make(
        n_latents=256, k=8, batch_size=512, precision="32-true", gpus=1, memory="1TB", callbacks=None,
        cache=None, source=None, hookpoint=None, controls=None, **settings,
    ):  # fmt: skip
        module = SparseAutoencoderModule(partial(TopK, n_latents=n_latents, k=k), controls=controls)
        data = ActivationDataModule(cache, source or Source(**settings), hookpoint, batch_size)
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=100, precision=precision, logger=False, callbacks=callbacks,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        return plan_run(module, data, trainer, gpus, memory)

    return make


def _step(d_model, n_latents, k, rows, precision, auxk, **changes):
    """A step of a TopK dictionary on this machine's processor."""
    with torch.device("meta"):
        dictionary = TopK(d_model, n_latents, k)
    sizes = [p.numel() for p in dictionary.parameters()]
    values = {
        "rows": rows, "held_out_rows": rows, "d_model": d_model, "n_latents": n_latents,
        "entries": math.ceil(dictionary.entries_per_row), "revived": d_model // 2 if auxk else 0,
        "weights": sum(sizes), "largest": max(sizes), "buffers": d_model + 1, "precision": precision,
        "row_element": 4, "holds_gradients": False, "on_processor": True,
        "chooses_in_rows": True,
    }  # fmt: skip
    return Step(**values | changes)


def test_memory_by_hand():
    """76 weights, 5 buffers, counters of 17 bytes; x, u, the code in both orders, u_hat and three like it."""
    memory = memory_of(STEP)
    assert memory.parameters == 76 * 4 + 5 * 4 + 8 * 17
    assert (memory.gradients, memory.moments) == (304, 608)
    x, code = 16 * 4 * 4, 16 * 2 * (4 + 3 * 8) + 8 * 8
    assert memory.activations == 2 * x + code + 4 * x == 2496
    assert memory.total == 460 + 304 + 608 + 2496
    assert memory.peak_at == "the forward pass"


def test_bfloat16_halves_pre_activations_alone():
    large = Step(**{**STEP.__dict__, "n_latents": 4096, "revived": 2})
    full, half = memory_of(large), memory_of(Step(**{**large.__dict__, "precision": "bf16-mixed"}))
    assert (full.parameters, full.gradients, full.moments) == (half.parameters, half.gradients, half.moments)
    saved = 16 * 4096 * 2 + 16 * 2 * 2  # the pre-activations, and AuxK's values
    copies = (32 + 16 * 4) * 2  # of the encoder's weights and its input
    assert full.activations - half.activations == saved - copies


def test_a_processor_holds_a_block_of_pre_activations_and_the_weights_as_it_likes_them():
    on_gpu, here = (
        memory_of(Step(**{**STEP.__dict__, "rows": 2048, "n_latents": 2**16, "on_processor": cpu}))
        for cpu in (False, True)
    )
    rows = 2048 - 256  # of 4 bytes a latent, and a mark
    assert on_gpu.activations - here.activations == rows * 2**16 * 5 - 32 * 4


def test_more_rows_held_out_than_trained_on_peak_in_validation():
    memory = memory_of(Step(**{**STEP.__dict__, "held_out_rows": 128}))
    assert memory.peak_at == "validation"


@pytest.mark.parametrize(
    ("shape", "changes", "trainer"),
    [
        ((64, 1024, 8, 1024, "32-true", False), {}, {}),
        ((64, 1024, 8, 1024, "bf16-mixed", True), {}, {}),
        ((256, 1024, 64, 256, "32-true", True), {}, {}),
        ((128, 1024, 8, 128, "32-true", False), {"held_out_rows": 2048, "row_element": 2}, {}),
        ((256, 2048, 8, 64, "64-true", True), {"holds_gradients": True}, {"accumulate_grad_batches": 3}),
    ],
)
def test_planned_memory_is_within_a_tenth_of_measured(shape, changes, trainer):
    step = _step(*shape, **changes)
    module = SparseAutoencoderModule(
        partial(TopK, n_latents=step.n_latents, k=step.entries),
        auxk_coefficient=1 / 32 if step.revived else 0.0,
        dead_after_tokens=10**9,
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    dtype = torch.float16 if step.row_element == 2 else torch.float32
    measured = measure_plan.measure(
        module, step, dtype, accelerator="cpu", precision=step.precision, **trainer
    )
    assert memory_of(step).total == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        *((kind, {}) for kind in KINDS),
        ("TopK", {"ema_decay": 0.9}),
        ("TopK", {"row_sparse_adam": True, "revival": []}),
        ("JumpReLU", {"revival": ["auxk"]}),
    ],
)
def test_planned_memory_of_every_kind_is_within_a_tenth_of_measured(kind, model, tmp_path):
    """At its own revival and L0 at the start."""
    asked = {"target_l0": 16.0} if "target_l0" in KINDS[kind] else {"k": 16}
    module = SparseAutoencoderModule(partial(Dictionary.kinds[kind], n_latents=4096, **asked), **model)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    rows = import_rows(torch.randn(4096, 128), tmp_path / "cache", held_out=0.5).location
    (step,) = plan_run(module, ActivationDataModule(str(rows), batch_size=2048), trainer, 1).each
    measured = measure_plan.measure(module, step, torch.float32, accelerator="cpu")
    assert memory_of(step).total == pytest.approx(measured, rel=0.1)


def test_planned_memory_of_several_is_within_a_tenth_of_measured():
    """All of them at once in the forward pass, where each has kept what its backward pass needs."""
    steps = [
        _step(64, 1024, 8, 1024, "32-true", auxk=True),
        _step(64, 512, 32, 1024, "32-true", auxk=True),
        _step(64, 2048, 8, 1024, "32-true", auxk=True),
    ]
    kinds = {f"d{i}": partial(TopK, n_latents=s.n_latents, k=s.entries) for i, s in enumerate(steps)}
    module = SparseAutoencoderModule(dictionaries=kinds, dead_after_tokens=10**9)
    measured = measure_plan.measure(module, steps[0], torch.float32, accelerator="cpu", precision="32-true")
    assert memory_of(*steps).total == pytest.approx(measured, rel=0.1)
    assert memory_of(*steps).moments == sum(memory_of(step).moments for step in steps)


def test_the_fit_of_nmf_counts_where_it_is_the_peak(plan):
    small = plan(callbacks=[NMFBaseline()])
    assert small.memory.peak_at == "the fit of the NMF baseline"
    assert small.memory.total > plan().memory.total
    assert plan(n_latents=200_000, callbacks=[NMFBaseline()]).memory == plan(n_latents=200_000).memory


def test_the_start_that_a_soft_decoder_stays_near_counts(plan):
    parameters = [plan(controls=control).memory.parameters for control in (None, "decoder", "soft_decoder")]
    assert parameters[0] == parameters[1] == parameters[2] - 256 * 128 * 4


def test_a_plan_needs_neither_cache_nor_weights_and_leaves_nothing(plan, tmp_path):
    made = plan(hookpoints=["resid.2"], n_tokens=128_000, dtype="bfloat16", exclude_first_position=True)
    assert (made.cache.d_model, made.dictionary.d_model) == (128, 128)
    assert made.dictionary.W_dec.is_meta
    assert made.cache.rows == 1000 * 127
    assert made.cache.bytes_to_come == 1000 * 127 * (128 * 2 + 8 + 16)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_agrees_with_the_cache_that_is_made(plan, tiny_cache, tiny_source):
    before = plan(source=tiny_source, hookpoint="resid.1").cache
    after = plan(source=tiny_source, hookpoint="resid.1", cache=tiny_cache.location).cache
    assert (before.d_model, before.row_dtype) == (after.d_model, after.row_dtype) == (16, torch.float32)
    # Whole contexts of each split, and the JSON and headers of a small cache.
    assert before.rows == pytest.approx(after.rows, rel=0.01)
    assert before.total_bytes == pytest.approx(after.total_bytes, rel=0.1)
    assert after.bytes_to_come == after.tokens_to_run == 0
    assert after.model is None


def test_int8_rows_take_a_byte_a_number_and_a_scale(plan):
    made = plan(n_tokens=128_000, dtype="int8")
    assert made.cache.total_bytes == 128_000 * (128 + 4 + 8 + 16)
    assert made.step.row_element == 4  # as they are read


def test_a_bounded_cache_counts_its_bound_and_the_language_model_beside_the_training(plan):
    whole, bounded = plan(n_tokens=10_000_000), plan(n_tokens=10_000_000, disk="1GB")
    assert bounded.cache.total_bytes == 10**9 < whole.cache.total_bytes
    model = load_language_model("demo").model
    assert bounded.total_memory - whole.total_memory == 4 * sum(p.numel() for p in model.parameters())


def test_model_size_is_that_of_the_model(tiny_model):
    size = model_size(str(tiny_model), ["resid.1", "resid.2"])
    model = load_language_model(str(tiny_model)).model
    assert (size.d_model, size.dtype) == (16, torch.float32)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    run = find_blocks(model)[1][:2]
    assert size.parameters_run == sum(p.numel() for block in run for p in block.parameters())
    with pytest.raises(InputError, match=r"no resid.4; it has resid.0 to resid.3"):
        model_size(str(tiny_model), ["resid.4"])


def test_entries_are_asked_of_the_kind():
    with torch.device("meta"):
        kinds = TopK(8, 64, 5), BatchTopK(8, 64, 2.5), JumpReLU(8, 64, target_l0=7)
        unknown = ReLU(8, 64, sparsity_coefficient=0.1)
    assert [kind.entries_per_row for kind in (*kinds, unknown)] == [5.0, 2.5, 7.0, 64.0]


def test_gpus_share_rows_and_send_gradients(plan):
    alone, eight = plan(), plan(gpus=8)
    assert (alone.step.rows, eight.step.rows, eight.step.held_out_rows) == (512, 64, 64)
    assert alone.sent_bytes == 0
    numbers = 2 * 128 * 256 + 256 + 128 + (256 + 8)  # the counters of latents ride along
    assert eight.sent_bytes == ring_bytes(4 * numbers, 8) == 2 * 7 * 4 * numbers // 8
    assert ring_bytes(1000, 2) == 1000


def test_a_batch_that_gpus_do_not_share_is_refused(plan):
    with pytest.raises(InputError, match=r"`plan.gpus` must .* divide `batch_size`=512, got 3"):
        plan(gpus=3)


def test_memory_that_does_not_fit_is_refused_with_what_helps(plan):
    with pytest.raises(InputError, match=r"`plan.memory` must be at least 1.13 GB .* got 1.02 GB: ") as error:
        plan(n_latents=8192, batch_size=2048, memory="1.02GB").check()
    assert "`batch_size`" not in str(error.value)  # weights, gradients and moments alone take more
    assert "33.9 MB on every GPU" in str(error.value)
    with pytest.raises(InputError, match=r"too little; `batch_size` 512 fits, \d+ GPUs fit\."):
        plan(n_latents=8192, batch_size=2048, memory="1.08GB").check()
    with pytest.raises(InputError, match=r"`batch_size` 1,024 fits, 2 GPUs fit, .* bf16-mixed fits\."):
        plan(n_latents=8192, batch_size=2048, memory="1.1GB").check()
    with pytest.raises(InputError, match=r"fits without the NMF baseline"):
        plan(callbacks=[NMFBaseline()], memory="1.02GB").check()
    with pytest.raises(InputError, match=r"must hold the language model, 1.01 GB with"):
        plan(memory="1GB").check()
    plan(n_latents=8192, batch_size=2048, memory="1.14GB").check()
    with pytest.raises(InputError, match=r"`plan.memory` must be a size in bytes"):
        plan(memory="much")


def test_disk_that_does_not_fit_is_refused(plan, monkeypatch, tiny_cache, tiny_source):
    monkeypatch.setattr(LocalPlace, "free_bytes", lambda self: 10**9)
    plan(n_tokens=100_000).check()
    with pytest.raises(InputError, match=r"needs 5.36 GB more in caches.* of checkpoints: 4.36 GB more than"):
        plan(n_tokens=10_000_000).check()
    plan(n_tokens=10_000_000, disk="900MB").check()
    made = plan(
        n_latents=2_000_000, batch_size=32, source=tiny_source, cache=tiny_cache.location, hookpoint="resid.1"
    )  # fmt: skip
    with pytest.raises(InputError, match=r"default_root_dir` .* needs 2.81 GB for checkpoints, 1.81 GB more"):
        made.check()


def test_without_a_gpu_several_are_compared_only_with_what_is_given(plan):
    assert plan(gpus=8, memory=None).memory_limit is None
    assert "give a GPU's memory as --plan.memory" in str(plan(gpus=8, memory=None))


def test_times_have_two_digits_at_most():
    shown = [format_seconds(s) for s in (0.00123, 12.6, 100.0, 5000.0, 40_000.0, 500_000.0)]
    assert shown == ["1.2 ms", "13 s", "1.7 min", "83 min", "11 h", "5.8 days"]
    assert (str(Span(1.0, 50.0)), str(Span(1.0, 61.0))) == ("under a minute", "1 s to 61 s")


def test_the_table_names_every_part(plan):
    text = str(plan(gpus=2, n_tokens=128_000, memory="80GB"))
    for part in (
        "TopK(d_model=128, n_latents=256, k=8) on 2 GPUs: 256 rows a step on each of 2, 32-true",
        "parameters", "gradients", "moments", "activations", "total", "of the 80 GB of each GPU",
        "128,000 rows", "checkpoints", "sent by each GPU", "GB/s assumed", "2 x H100", "assumed: 10% to 40%",
    ):  # fmt: skip
        assert part in text, part
    assert max(map(len, text.splitlines())) < 120


def test_the_script_prints_both(monkeypatch, capsys, tmp_path):
    arguments = ["--config", "quickstart.yaml", "--data.batch_size", "256", "--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", ["measure_plan.py", *arguments])
    monkeypatch.chdir(tmp_path)
    measure_plan.main()
    printed = capsys.readouterr().out
    assert "planned " in printed
    assert abs(float(printed.rpartition("= ")[2].strip().rstrip("%"))) < 10


def test_every_configuration_of_the_demo_can_be_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = SaeCLI(["--config", "quickstart.yaml", "--trainer.accelerator", "cpu"])
    made = plan_run(cli.model, cli.datamodule, cli.trainer)
    made.check()
    assert (made.steps, made.tokens) == (2000, 4_096_000)
    assert "this processor" in str(made)

"""Controls: what is frozen stays bit for bit, what is half frozen stays near, and all the rest learns."""

from functools import partial

import lightning
import pytest
import torch
from support.laws import KINDS
from torch.nn import functional as F

from sae.activations import ActivationDataModule
from sae.activations.exchange.imported import import_rows
from sae.dictionaries import BatchTopK, Dictionary, Gated, JumpReLU, ReLU, TopK
from sae.training import SparseAutoencoderModule
from sae.training.averaging import WeightAverages
from sae.training.controls import LEAST_COSINE, Controls, NearStart
from sae.training.divergence import clip_gradients
from sae.training.learner import Learner
from sae.training.recipe import Recipe

TOPK = partial(TopK, n_latents=96, k=2)
CONTROLS = {"frozen": "decoder", "soft": "soft_decoder", "blind": "encoder"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    torch.manual_seed(0)
    rows = torch.randn(3000, 16) @ torch.randn(16, 16)
    return import_rows(rows, tmp_path_factory.mktemp("controls") / "cache", held_out=0.1).location


def _trained(cache, folder, steps=12, ckpt_path=None, callbacks=(), lr=1e-3, **module):
    """The module after a training by Lightning alone: no run folder, no report."""
    lightning.seed_everything(0, verbose=False)
    module = SparseAutoencoderModule(lr=lr, warmup_steps=3, dead_after_tokens=400, **module)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        gradient_clip_val=1.0, val_check_interval=steps, check_val_every_n_epoch=None,
        default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip
    data = ActivationDataModule(str(cache), batch_size=120)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


def _stepped(make, control, steps=30, lr=1e-3):
    """A learner after some steps without Lightning, and the parameters that it began with."""
    x = torch.randn(3000, 16) @ torch.randn(16, 16)
    dictionary, recipe = make(16), Recipe(dead_after_tokens=400)
    recipe = Controls(control).recipe_of("dictionary", dictionary, recipe)
    dictionary.set_input_statistics(x.mean(0), float(x.square().sum(1).mean()))
    dictionary.l0_factor = recipe.l0_start_for(dictionary)
    u = dictionary.normalise(x)
    if dictionary.begins_with_rows:
        dictionary.begin(u)
    learner = Learner(dictionary, recipe, control=control)
    learner.plan(steps, 120)
    began = {name: p.detach().clone() for name, p in dictionary.named_parameters()}
    optimizer = torch.optim.Adam(dictionary.parameters(), lr=lr)
    for step in range(steps):
        learner.loss(u[torch.randperm(len(u))[:120]], step).total.backward()
        learner.arrive(step)
        clip_gradients(list(dictionary.parameters()), 1.0, None)
        optimizer.step()
        optimizer.zero_grad()
        learner.settle(step, optimizer)
    fired = dictionary.encode_normalised(u).without_zeros()
    return learner, began, len(fired.indices) / len(u)


class _AtStart(lightning.Callback):
    """Notes the weights that the first step finds."""

    def on_train_start(self, trainer, module):
        self.weights = {
            name: {key: p.detach().clone() for key, p in dictionary.named_parameters()}
            for name, dictionary in module.dictionaries.items()
        }


def _moved(dictionary, began):
    """The parameters that are not where they began, by name."""
    now = dict(dictionary.named_parameters())
    return {key for key, value in began.items() if not torch.equal(value, now[key])}


def _one_size(dictionary, began):
    """Of a frozen encoder all that says how large latents are has changed by one factor, and nothing else."""
    now = dict(dictionary.named_parameters())
    if isinstance(dictionary, Gated):
        shift = (now["r_mag"] - began["r_mag"])[0]
        torch.testing.assert_close(now["r_mag"], began["r_mag"] + shift)
        torch.testing.assert_close(now["b_mag"], began["b_mag"] * shift.exp())
        assert torch.equal(now["W_enc_rows"], began["W_enc_rows"]) and torch.equal(
            now["b_enc"], began["b_enc"]
        )
        assert shift != 0
        return
    factor = _one_factor(now["W_enc_rows"], began["W_enc_rows"])
    assert factor != 1
    for name in set(now) - {"W_dec", "b_dec"}:
        torch.testing.assert_close(now[name], factor * began[name], rtol=1e-4, atol=1e-6)


def _one_factor(now, began):
    """Of one factor between what is and what was, and what it is."""
    factor = (now * began).sum() / began.square().sum()
    torch.testing.assert_close(now, factor * began, rtol=1e-5, atol=1e-7)
    return factor


# --- what moves


@pytest.mark.shapes_unchecked
@pytest.mark.parametrize(
    "model", [{"ema_decay": 0.9}, pytest.param({"row_sparse_adam": True}, marks=pytest.mark.slow)]
)
def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns(cache, tmp_path, model):
    makes, start = dict.fromkeys(("sae", *CONTROLS), TOPK), _AtStart()
    settings = {"dictionaries": makes, "controls": CONTROLS, "callbacks": [start], **model}
    module, _ = _trained(cache, tmp_path, steps=30, **settings)

    def moved(name):
        return _moved(module.dictionaries[name], start.weights[name])

    everything = {"W_dec", "b_dec", "W_enc_rows", "b_enc"}
    assert moved("sae") == moved("soft") == everything
    assert moved("frozen") == everything - {"W_dec"}
    assert moved("blind") == {"W_dec", "b_dec", "W_enc_rows"}  # b_enc is zero
    assert torch.equal(start.weights["blind"]["W_dec"], start.weights["blind"]["W_enc_rows"])
    _one_factor(module.dictionaries["blind"].W_enc_rows, start.weights["blind"]["W_enc_rows"])
    with module.averaged():
        assert moved("frozen") == everything - {"W_dec"}
        _one_factor(module.dictionaries["blind"].W_enc_rows, start.weights["blind"]["W_enc_rows"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("control", CONTROLS.values())
def test_every_kind_learns_what_its_control_leaves(kind, control):
    if (kind, control) == ("MatchingPursuit", "encoder"):
        return
    make = partial(Dictionary.kinds[kind], **KINDS[kind])
    learner, began, _ = _stepped(make, control, steps=8)
    everything = set(began)
    if control == "encoder":
        assert {"W_dec", "b_dec"} <= _moved(learner.dictionary, began)
        _one_size(learner.dictionary, began)
        return
    kept = {"decoder": {"W_dec"}, "soft_decoder": set()}[control]
    assert _moved(learner.dictionary, began) == everything - kept


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "MatchingPursuit"])
@pytest.mark.parametrize("whitened", [False, True])
def test_latents_of_another_size_are_the_same_ones_saved_too(kind, whitened):
    dictionary = partial(Dictionary.kinds[kind], **KINDS[kind])(16)
    x = torch.randn(200, 16) @ torch.randn(16, 16) + 1.0
    dictionary.set_input_statistics(x.mean(0), float((x - x.mean(0)).square().sum(1).mean()))
    if whitened:
        dictionary.set_whitening(x.T.cov())
    if dictionary.begins_with_rows:
        dictionary.begin(dictionary.normalise(x))
    if isinstance(dictionary, BatchTopK):
        code = dictionary.training_code(dictionary.normalise(x))
        dictionary.hear({name: value.detach() for name, value in code.news.items()})
        assert dictionary.threshold > 0.01
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            if name not in ("W_dec", "threshold"):
                parameter.add_(0.01 * torch.randn_like(parameter))
    before = dictionary.encode(x)
    dictionary.resize_latents(torch.tensor(1.7))
    again = type(dictionary)(**dictionary.config)
    again.load_saved_tensors(dictionary.saved_tensors())
    assert before.count_nonzero() > 100
    torch.testing.assert_close(dictionary.encode(x), 1.7 * before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again.encode(x), 1.7 * before, rtol=1e-3, atol=1e-4)


@pytest.mark.shapes_unchecked
def test_a_frozen_encoder_finds_the_size_that_least_squares_has():
    learner, began, _ = _stepped(partial(TopK, n_latents=96, k=12), "encoder", steps=300, lr=1e-2)
    dictionary = learner.dictionary
    assert 0.2 < _one_factor(dictionary.W_enc_rows, began["W_enc_rows"]) < 0.8
    torch.manual_seed(0)
    u = dictionary.normalise(torch.randn(3000, 16) @ torch.randn(16, 16))  # those that it was trained on
    part = dictionary.decode_normalised(dictionary.encode_normalised(u)) - dictionary.b_dec
    best = ((u - dictionary.b_dec) * part).sum() / part.square().sum()
    assert best.item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", [JumpReLU, Gated, ReLU])
def test_thresholds_are_frozen_with_the_encoder_at_the_target(kind):
    learner, began, l0 = _stepped(partial(kind, n_latents=96, target_l0=3.0), "encoder")
    assert {"W_dec", "b_dec"} <= _moved(learner.dictionary, began)
    _one_size(learner.dictionary, began)
    assert learner.sparsity is None and learner.ways == ()
    assert l0 == pytest.approx(3.0, rel=0.02)


def test_the_threshold_in_use_of_batchtopk_still_follows_its_batches():
    learner, began, l0 = _stepped(partial(BatchTopK, n_latents=96, k=2.5), "encoder")
    assert _moved(learner.dictionary, began) == {"W_dec", "b_dec", "W_enc_rows"}
    assert learner.dictionary.threshold > 0 and l0 == pytest.approx(2.5, rel=0.1)


def test_soft_directions_reach_the_boundary_and_stay_within():
    learner, began, _ = _stepped(TOPK, "soft_decoder", lr=0.1)
    directions, start = learner.dictionary.W_dec, began["W_dec"]
    assert torch.equal(learner.near_start.start, start)
    cosines = F.cosine_similarity(directions.double(), start.double())
    assert cosines.min() >= LEAST_COSINE - 1e-6
    assert (cosines < LEAST_COSINE + 1e-6).float().mean() > 0.2
    norms = directions.double().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


def test_directions_that_are_free_go_further_than_soft_ones_may():
    learner, began, _ = _stepped(TOPK, None, lr=0.1)
    assert F.cosine_similarity(learner.dictionary.W_dec, began["W_dec"]).min() < LEAST_COSINE - 0.1


def test_the_mean_of_soft_directions_is_soft():
    torch.manual_seed(1)
    start = F.normalize(torch.randn(50, 16), dim=1)
    dictionary = TopK(16, 50, 2)
    with torch.no_grad():
        dictionary.W_dec.copy_(start)
    near, averages = NearStart(dictionary.W_dec), WeightAverages(dictionary, 0.5)
    for _ in range(20):
        with torch.no_grad():
            dictionary.W_dec.add_(torch.randn(50, 16))
        dictionary.constrain()
        near.bring_back(dictionary.W_dec)
        averages.update(dictionary)
    with averages.used_in(dictionary):
        assert F.cosine_similarity(dictionary.W_dec, start).min() >= LEAST_COSINE - 1e-6


def test_projection_is_the_nearest_that_is_allowed():
    s = torch.tensor([[1.0, 0.0, 0.0]]).repeat(4, 1)
    w = torch.tensor([[0.96, 0.28, 0.0], [0.6, 0.0, 0.8], [-0.6, 0.8, 0.0], [-1.0, 0.0, 0.0]])
    expected = torch.tensor([[0.96, 0.28, 0.0], [0.8, 0.0, 0.6], [0.8, 0.6, 0.0], [1.0, 0.0, 0.0]])
    near = NearStart(s)
    near.bring_back(w)
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-7)
    assert torch.equal(w[0], torch.tensor([0.96, 0.28, 0.0]))


def test_clipping_does_not_count_what_is_frozen():
    for control, frozen in (("decoder", {"W_dec"}), ("encoder", {"W_enc_rows", "b_enc"})):
        dictionary = TOPK(16)
        learner = Learner(dictionary, Recipe(()), control=control)
        learner.loss(torch.randn(50, 16), 0).total.backward()
        found = {name: p.grad for name, p in dictionary.named_parameters() if p.grad is not None}
        assert set(found) == {"W_dec", "b_dec", "W_enc_rows", "b_enc"} - frozen
        norm = sum(gradient.square().sum() for gradient in found.values()).sqrt()
        torch.testing.assert_close(clip_gradients(list(dictionary.parameters()), 1e-3, None), norm)


# --- laws


@pytest.mark.shapes_unchecked
def test_each_becomes_beside_others_what_it_would_be_alone(cache, tmp_path):
    makes = dict.fromkeys(("sae", *CONTROLS), TOPK)
    several, trainer = _trained(cache, tmp_path, dictionaries=makes, controls=CONTROLS)
    moments = trainer.optimizers[0].state
    for name in makes:
        alone, own_trainer = _trained(cache, tmp_path, dictionary=TOPK, controls=CONTROLS.get(name))
        mine, own = several.each[name].state_dict(), alone.learner.state_dict()
        assert mine.keys() == own.keys()
        assert [key for key in own if not torch.equal(mine[key], own[key])] == [], name
        pairs = zip(several.dictionaries[name].parameters(), alone.dictionary.parameters(), strict=True)
        for p, q in pairs:
            for key, value in own_trainer.optimizers[0].state.get(q, {}).items():
                assert torch.equal(value, moments[p][key]), (name, key)
        assert several.held_out.scores[name] == alone.scores


@pytest.mark.shapes_unchecked
def test_an_interrupted_run_goes_on_to_the_same_weights(cache, tmp_path):
    """Soft ones too: where they began is in the checkpoint, and not made anew."""
    settings = {"dictionaries": dict.fromkeys(CONTROLS, TOPK), "controls": CONTROLS, "lr": 0.05}
    unbroken, _ = _trained(cache, tmp_path, **settings)
    checkpoint = tmp_path / "middle.ckpt"

    class Interrupt(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 7:
                trainer.save_checkpoint(checkpoint)
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        _trained(cache, tmp_path, callbacks=[Interrupt()], **settings)

    def begun_elsewhere(d_model):  # the start must come from the checkpoint
        torch.randn(1)
        return TOPK(d_model)

    settings["dictionaries"] = dict.fromkeys(CONTROLS, begun_elsewhere)
    resumed, trainer = _trained(cache, tmp_path, ckpt_path=checkpoint, **settings)
    assert trainer.global_step == 12
    found, wanted = resumed.state_dict(), unbroken.state_dict()
    assert found.keys() == wanted.keys() and any("near_start.start" in key for key in found)
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []
    soft = resumed.each["soft"]
    cosines = F.cosine_similarity(soft.dictionary.W_dec.detach(), soft.near_start.start)
    assert cosines.min() == pytest.approx(LEAST_COSINE, abs=1e-5)  # else there was nothing to keep

"""Planted worlds are what they say."""

import itertools
import warnings
from dataclasses import replace
from pathlib import Path

import lightning
import pytest
import torch

from sae.activations import ActivationDataModule, Source
from sae.activations.datamodule import cache_folder
from sae.activations.ranks import Ranks
from sae.activations.synthetic import (
    PRESETS,
    PlantedWorld,
    World,
    WorldConfig,
    WorldSource,
    WorldStream,
    cached_truth,
    write_world,
)
from sae.activations.synthetic.rates import firing_rates, plant_forest
from sae.activations.synthetic.stream import HeldOutRows, WorldLoader
from sae.errors import InputError
from sae.ops.geometry import coherence, mean_max_cosine, spread_directions
from sae.training.rows import RowSource


def test_directions_keep_to_the_bound_and_rows_are_sparse_sums():
    world = PlantedWorld(256, 64, active=3, max_cosine=0.5)
    assert coherence(world.directions) <= 0.5
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(256))
    rows = world.sample(100)
    dense = rows.latents.to_dense(256)
    assert (dense > 0).sum(1).tolist() == [3] * 100
    torch.testing.assert_close(rows.x, dense @ world.directions, rtol=1e-4, atol=1e-5)


def test_mean_max_cosine_by_hand_and_between_truth_and_chance():
    truth = torch.eye(3)
    assert mean_max_cosine(truth, torch.eye(3)[[2, 0, 1]] * 5) == pytest.approx(1.0)
    assert mean_max_cosine(truth, torch.tensor([[1.0, 1.0, 0.0]])) == pytest.approx(2 / 3 * 0.5**0.5)


def test_impossible_bound_is_an_error_that_says_what_is_possible():
    with pytest.raises(ValueError, match=r"`max_cosine`=0.1 was not reached .*no set goes below 0.350"):
        spread_directions(20, 6, 0.1, torch.Generator().manual_seed(0), steps=50)


def test_more_active_than_there_are_is_an_error():
    with pytest.raises(InputError, match="`active` must be in"):
        PlantedWorld(8, 4, active=9)


def _counted(world, n_rows=40_000):
    """Firings (rows, n_features) as a matrix of 0 and 1, and the code."""
    code = world.sample(n_rows).latents
    return (code.to_dense(world.config.n_features) != 0).float(), code


@pytest.fixture(scope="module")
def tiny():
    return World(PRESETS["tiny"])


@pytest.fixture(scope="module")
def tiny_firings(tiny):
    return _counted(tiny)


@pytest.mark.parametrize(("name", "l0"), [("tiny", 3.0), ("small", 6.0)])
def test_presets_have_the_mean_l0_that_they_ask_for(name, l0):
    assert World(PRESETS[name]).mean_l0 == pytest.approx(l0, abs=1e-6)


def test_the_benchmark_world_has_its_l0_and_trees():
    config = PRESETS["synthsaebench-16k"]
    forest = plant_forest(config)
    rates = firing_rates(config, forest)
    assert float(rates.sum()) == pytest.approx(34, abs=0.5) and float(rates.max()) == pytest.approx(0.4)
    assert config.tree_nodes == 128 * (1 + 4 + 16 + 64)
    assert int((forest.parents < 0).sum()) == 16_384 - 128 * 84


def test_trees_by_hand():
    config = WorldConfig(n_features=16, n_trees=2, branching=2, depth=2)
    assert plant_forest(config).parents.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, -1, -1]


def test_rates_by_hand_where_children_ask_for_more_than_their_parent_has():
    config = WorldConfig(
        n_features=4, n_trees=1, branching=2, depth=1, zipf_exponent=1.0, mean_l0=None,
        max_rate=0.5, min_rate=0.2, child_share=0.8,
    )  # fmt: skip
    # Asked: 0.2 + 0.3 (1/r - 1/4) / (3/4) = 0.5, 0.3, 0.2333, 0.2; the children may have 0.8 * 0.5 together.
    scale = 0.4 / (0.3 + 0.7 / 3)
    expected = [0.5, 0.3 * scale, 0.7 / 3 * scale, 0.2]
    assert firing_rates(config, plant_forest(config)).tolist() == pytest.approx(expected)


def test_firing_rates_are_those_of_the_configuration(tiny, tiny_firings):
    firings, _ = tiny_firings
    error = (firings.double().mean(0) - tiny.rates).abs()
    spread = (tiny.rates * (1 - tiny.rates) / len(firings)).sqrt()
    assert float((error / spread).max()) < 5  # of 256 features; rows are independent
    assert float((error / spread).square().mean()) == pytest.approx(1, abs=0.35)


def test_a_child_fires_with_its_parent_only_and_siblings_never_together(tiny, tiny_firings):
    firings, _ = tiny_firings
    child = (tiny.parents >= 0).nonzero().squeeze(1)
    parent = tiny.parents[child]
    assert len(child) == 8 * (3 + 9)
    assert not (firings[:, child] > firings[:, parent]).any()
    together = torch.zeros(len(firings), 256).index_add_(1, parent, firings[:, child])
    assert together.max() == 1
    both = (firings[:, child] * firings[:, parent]).sum(0)
    assert (both > 0).all()


def test_magnitudes_keep_their_means_and_children_follow_their_parents(tiny, tiny_firings):
    firings, code = tiny_firings
    dense = code.to_dense(256).double()
    means = dense.sum(0) / firings.sum(0)
    spread = (dense.square().sum(0) / firings.sum(0) - means.square()).sqrt() / firings.sum(0).sqrt()
    assert ((means - tiny.mean_magnitudes).abs() < 5 * spread).all()
    assert tiny.mean_magnitudes[0] == pytest.approx(5, abs=0.05)
    parent, child = 0, 8
    rows = firings[:, child] > 0
    pair = torch.stack([dense[rows, parent], dense[rows, child]])
    config = replace(PRESETS["tiny"], magnitude_std=0.0, magnitude_max=4.0)
    flat = World(config).sample(1000).latents
    torch.testing.assert_close(flat.values, torch.full_like(flat.values, 4.0))
    assert pair.log().corrcoef()[0, 1] > 0.2  # independent magnitudes would have 0 within 0.05


def test_correlations_change_which_features_fire_together_but_no_rate():
    shared = replace(PRESETS["tiny"], correlation_rank=1, correlation_scale=0.9)
    alone = replace(shared, correlation_rank=0)
    spreads = []
    for config in (shared, alone):
        world = World(config)
        firings, _ = _counted(world, 20_000)
        assert float(firings.sum(1).mean()) == pytest.approx(3.0, abs=0.15)
        roots = firings[:, world.parents < 0]
        spreads.append(float(roots.sum(1).var() / (roots.mean(0) * (1 - roots.mean(0))).sum()))
    assert spreads[0] > 1.3 and spreads[1] == pytest.approx(1, abs=0.05)


def test_rows_are_the_code_on_the_directions_with_bias_and_noise(tiny):
    assert coherence(tiny.directions) <= PRESETS["tiny"].max_cosine
    assert float(tiny.bias.norm()) == pytest.approx(0.5)
    rows = tiny.sample(2000)
    noise = rows.x - rows.latents.to_dense(256) @ tiny.directions - tiny.bias
    assert float(noise.std()) == pytest.approx(0.05, rel=5 / (2 * noise.numel()) ** 0.5)
    exact = World(replace(PRESETS["tiny"], noise=0.0)).sample(300)
    made = exact.latents.to_dense(256) @ tiny.directions + tiny.bias
    torch.testing.assert_close(exact.x, made, rtol=1e-4, atol=1e-4)


def _same(a, b):
    return all(torch.equal(p, q) for p, q in zip((a.x, *a.latents[:3]), (b.x, *b.latents[:3]), strict=True))


def test_rows_are_a_function_of_seed_and_index(tiny):
    again = World(PRESETS["tiny"])
    assert torch.equal(again.directions, tiny.directions)
    later = again.sample(700, index=1)
    assert _same(later, tiny.sample(700, index=1)) and _same(later, tiny.rows(700, 1400))
    assert not torch.equal(later.x, tiny.sample(700, index=2).x)
    assert not torch.equal(later.x, tiny.rows(700, 1400, stream=1).x)
    other = World(replace(PRESETS["tiny"], seed=1))
    assert not torch.equal(other.directions, tiny.directions)


def test_any_portions_join_to_the_same_rows(tiny):
    whole = tiny.rows(500, 3500)
    cuts = [500, 501, 1024, 2047, 2048, 3000, 3500]
    parts = [tiny.rows(a, b) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat([p.x for p in parts]), whole.x)
    for name in ("values", "indices"):
        assert torch.equal(torch.cat([getattr(p.latents, name) for p in parts]), getattr(whole.latents, name))
    lengths = [p.latents.row_offsets.diff() for p in parts]
    assert torch.equal(torch.cat(lengths), whole.latents.row_offsets.diff())


def test_moments_estimate_the_exact_mean(tiny):
    moments = tiny.moments(20_000)
    spread = (moments.covariance.diagonal() / moments.count).sqrt()
    assert ((moments.mean - tiny.mean).abs() < 5 * spread).all()
    assert moments.count == 20_000


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"min_rate": 0.0}, r"`min_rate` must be in \(0, 1\), got min_rate=0.0"),
        ({"max_rate": 0.3}, "`max_rate` or `mean_l0` must be given, and not both"),
        ({"mean_l0": None}, "`max_rate` or `mean_l0` must be given"),
        ({"mean_l0": 200.0}, r"`mean_l0` must lie in \[0.695, .*\] .*, got 200.0"),
        ({"n_trees": 100}, "take 1,300 features, there are 256"),
        ({"correlation_scale": 0.6}, "makes them 1.44 of a feature's variance"),
        ({"n_features": 104, "d_model": 8, "max_cosine": 0.1}, "`max_cosine`=0.1 was not reached"),
    ],
)
def test_impossible_world_is_an_error(changes, match):
    with pytest.raises(InputError, match=match):
        World(replace(PRESETS["tiny"], **changes))


def test_other_bad_input_is_an_error(tiny, tmp_path, tiny_cache):
    with pytest.raises(InputError, match="`begin` and `end` must satisfy"):
        tiny.sample(0)
    with pytest.raises(InputError, match="`world` must be one of tiny, small, synthsaebench-16k, got 'big'"):
        WorldSource("big").config()
    with pytest.raises(InputError, match="`n_rows` must be at least 2"):
        write_world(tiny, tmp_path / "w", 1)
    with pytest.raises(InputError, match="was not made from a world"):
        cached_truth(tiny_cache.location)


def test_cache_has_the_worlds_rows_and_its_truth_can_be_made_again(tiny, tmp_path):
    cache = write_world(tiny, tmp_path / "world", 5000, held_out=0.3)
    truth = cached_truth(tmp_path / "world")
    assert (truth.n_train, truth.n_rows) == (3500, 5000)
    assert torch.equal(truth.world.directions, tiny.directions)
    assert torch.equal(truth.world.parents, tiny.parents)
    cached = torch.cat([batch.x for batch in cache.batches("held_out", "acts", 600)])
    again = list(truth.held_out(600))
    assert torch.equal(cached, torch.cat([rows.x for rows in again]))
    assert torch.equal(again[0].latents.indices, tiny.rows(3500, 4100).latents.indices)
    train = torch.cat([batch.x for batch in cache.batches("train", "acts", 600)])
    written = tiny.rows(0, 3500).x
    assert torch.equal(train[train[:, 0].argsort()], written[written[:, 0].argsort()])


def test_cache_of_another_world_is_refused_and_the_same_one_reused(tiny, tmp_path):
    def module(seed):
        source = WorldSource("tiny", n_rows=3000, held_out=0.1, seed=seed)
        return ActivationDataModule(str(tmp_path / "world"), world=source, batch_size=64)

    module(0).prepare_data()
    written = (tmp_path / "world" / "shard-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "world" / "world.json").unlink()  # as if it had been stopped between the two
    again = module(0)
    again.prepare_data()
    again.setup()
    assert (tmp_path / "world" / "shard-00000.safetensors").stat().st_mtime_ns == written
    assert cached_truth(tmp_path / "world").n_train == 2700
    assert next(iter(again.train_dataloader())).x.shape == (64, 64)
    with pytest.raises(InputError, match=r"made from another world; .* seed \(cache: 0, config: 1\)"):
        module(1).prepare_data()


def test_default_folder_is_named_after_the_world():
    folders = {cache_folder(None, None, WorldSource(seed=seed)) for seed in (0, 0, 1)}
    assert len(folders) == 2 and all(Path(f).name.startswith("world-small-") for f in folders)
    with pytest.raises(InputError, match="cannot both be given"):
        cache_folder(None, Source(), WorldSource())


def test_ranks_shares_join_to_the_batch_of_one_process(tiny):
    whole = [batch.x for batch in itertools.islice(WorldLoader(tiny, 1200, 5), 3)]
    shares = [itertools.islice(WorldLoader(tiny, 1200, 5, Ranks(rank, 3)), 3) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(batch, torch.cat([part.x for part in parts]))
    assert not torch.equal(whole[0], next(iter(WorldLoader(tiny, 1200, 6))).x)
    held_out = [torch.cat([b.x for b in HeldOutRows(tiny, 64, 130, Ranks(rank, 2))]) for rank in range(2)]
    assert len(held_out[0]) == len(held_out[1]) == 65
    with pytest.raises(InputError, match="multiple of the 7 ranks"):
        WorldLoader(tiny, 1200, 5, Ranks(0, 7))


def test_stream_resumes_at_the_next_batch_and_refuses_another_world(tiny):
    loader = WorldLoader(tiny, 256, 5)
    first = [batch.x for batch in itertools.islice(loader, 4)]
    resumed = WorldLoader(tiny, 256, 99)
    resumed.go_to({**loader.position(), "step": 2})
    assert torch.equal(next(iter(resumed)).x, first[2])
    with pytest.raises(InputError, match="saved with batch_size=256, here it is 512"):
        WorldLoader(tiny, 512, 5).go_to(loader.position())


class _Reader(lightning.LightningModule):
    """Keeps the rows it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch):
        self.seen.append(batch.x[0].clone())
        return self.weight * batch.x.mean()

    def validation_step(self, batch):
        assert batch.position is None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(tiny, folder, steps, checkpoint=None):
    torch.manual_seed(3)
    reader, data = _Reader(), WorldStream(tiny, batch_size=128, held_out_rows=200)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, val_check_interval=4,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(reader, datamodule=data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return reader.seen, data


def test_the_trainer_streams_validates_and_resumes(tiny, tmp_path):
    unbroken, data = _fit(tiny, tmp_path, 8)
    assert isinstance(data, RowSource) and data.d_model == 64 and data.moments.count == 65_536
    before, _ = _fit(tiny, tmp_path, 5)
    after, _ = _fit(tiny, tmp_path, 8, tmp_path / "5.ckpt")
    assert len(before) == 5 and len(after) == 3
    assert torch.equal(torch.stack([*before, *after]), torch.stack(unbroken))

"""Fits that are kept: found for the same rows and settings, and for nothing else."""

import json

import pytest
import torch

from sae.baselines import NMF
from sae.baselines.kept import FOLDER, keep, kept
from sae.errors import InputError
from sae.ops.moments import StreamingMoments

ABOUT = {"kind": "NMF", "config": {"n_latents": 3}, "rows": 100, "hookpoint": "resid.1", "cache": "abc"}


@pytest.fixture(scope="module")
def nmf():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    moments = StreamingMoments()
    moments.add(x)
    return NMF(5, 3).fit([x], moments.moments())


def test_a_kept_fit_codes_as_before(nmf, tmp_path):
    keep(nmf, tmp_path, ABOUT, 1.25)
    found = kept(tmp_path, ABOUT)
    x = torch.randn(20, 5)
    assert found.fit_s == 1.25 and torch.equal(found.baseline.encode(x), nmf.encode(x))
    assert torch.equal(found.baseline.sparse_code(x, 2).values, nmf.sparse_code(x, 2).values)


@pytest.mark.parametrize("key", ["hookpoint", "cache", "rows"])
def test_another_source_has_no_fit_yet(nmf, tmp_path, key):
    keep(nmf, tmp_path, ABOUT, 1.0)
    assert kept(tmp_path, ABOUT | {key: "other"}) is None


def test_a_fit_of_another_hookpoint_in_its_place_is_refused(nmf, tmp_path):
    keep(nmf, tmp_path, ABOUT | {"hookpoint": "resid.2"}, 1.0)
    (there,) = (tmp_path / FOLDER).iterdir()
    keep(nmf, tmp_path, ABOUT, 1.0)
    (here,) = set((tmp_path / FOLDER).iterdir()) - {there}
    (here / "about.json").write_text((there / "about.json").read_text())
    with pytest.raises(InputError, match="was fitted on another hookpoint; remove .*: it is fitted again"):
        kept(tmp_path, ABOUT)


def test_a_fit_that_was_not_finished_is_none(nmf, tmp_path):
    keep(nmf, tmp_path, ABOUT, 1.0)
    (folder,) = (tmp_path / FOLDER).iterdir()
    (folder / "about.json").unlink()
    assert kept(tmp_path, ABOUT) is None


def test_a_damaged_fit_is_an_error_that_says_what_to_do(nmf, tmp_path):
    keep(nmf, tmp_path, ABOUT, 1.0)
    (folder,) = (tmp_path / FOLDER).iterdir()
    (folder / "about.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON .*; remove .*: it is fitted again"):
        kept(tmp_path, ABOUT)


def test_where_nothing_can_be_written_the_fit_goes_on(nmf, tmp_path, capsys):
    (tmp_path / FOLDER).write_text("a file in its place")
    keep(nmf, tmp_path, ABOUT, 1.0)
    assert "the fit of NMF was not kept" in capsys.readouterr().err
    assert json.dumps(ABOUT) and kept(tmp_path, ABOUT) is None

"""Scores of codes on a run: what one process finds, two that share the rows find too."""

from types import SimpleNamespace
from unittest.mock import Mock

import lightning
import pytest
import torch

import sae
from sae.activations import ActivationDataModule
from sae.activations.loaders import HeldOutLoader
from sae.activations.ranks import ALONE, Ranks
from sae.callbacks import CodeScores
from sae.callbacks.code_scores import _coded
from sae.ops.bits import bits_per_row
from sae.ops.group import Group
from sae.training import SparseAutoencoderModule


def _data(cache, ranks=ALONE):
    module = ActivationDataModule(cache.location, hookpoint="resid.1", batch_size=64)
    module.setup()
    module.val_dataloader = lambda: HeldOutLoader(cache, "resid.1", 64, ranks)
    return module


def test_scores_are_those_of_the_codes_of_the_held_out_rows(without_first):
    dictionary = sae.TopK(16, 40, 5).requires_grad_(False)
    data = _data(without_first)
    scores = SimpleNamespace(l0=5.0)
    module = Mock(
        spec=SparseAutoencoderModule,
        dictionaries={"dictionary": dictionary},
        device=torch.device("cpu"),
        held_out=SimpleNamespace(scores={"dictionary": scores}),
    )
    callback = CodeScores()
    callback.on_test_end(Mock(spec=lightning.Trainer, datamodule=data, callbacks=[]), module)
    found = callback.metrics()
    codes = [dictionary.encode_sparse(batch.x.float()) for batch in data.val_dataloader()]
    l0 = sum(len(code.values) for code in codes) / sum(code.n_rows for code in codes)
    assert found["bits_per_token"] == pytest.approx(bits_per_row(40, l0, False))
    assert found["purity"] > found["purity_null"] > 0
    assert 0 <= found["cancellation"] <= 1 and found["baselines"] == {}


class _OneOfTwo(Group):
    """A rank whose fellow's rows are given beforehand."""

    def __init__(self, rank, others):
        super().__init__(rank, 2)
        self._others = iter(others)

    def gather(self, rows):
        other = next(self._others)
        return torch.cat([rows, other] if self.rank == 0 else [other, rows])


class _Noting(Group):
    """Notes what a rank would send."""

    def __init__(self, rank):
        super().__init__(rank, 2)
        self.sent = []

    def gather(self, rows):
        self.sent.append(rows)
        return rows


def test_rows_that_ranks_share_are_put_together_in_the_order_of_the_text(without_first):
    encode, cpu = sae.TopK(16, 40, 5).requires_grad_(False).encode_sparse, torch.device("cpu")
    whole = _coded(encode, _data(without_first), 10**6, cpu, Group())
    noting = [_Noting(rank) for rank in (0, 1)]
    data = [_data(without_first, Ranks(rank, 2)) for rank in (0, 1)]
    for rank in (0, 1):
        _coded(encode, data[rank], 10**6, cpu, noting[rank])
    for rank in (0, 1):
        code, tokens = _coded(encode, data[rank], 10**6, cpu, _OneOfTwo(rank, noting[1 - rank].sent))
        assert torch.equal(tokens, whole.tokens)
        for mine, alone in zip(code[:3], whole.code[:3], strict=True):
            assert torch.equal(mine, alone)

"""What codes say of tokens, cost in bits, and cancel within: every method, once, after the final test."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import lightning
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae.activations import ActivationDataModule
from sae.callbacks.baselines import BaselineCallback
from sae.dictionaries import Dictionary
from sae.inspection.purity import token_purity
from sae.ops.bits import bits_per_row
from sae.ops.cancellation import Cancellation
from sae.ops.group import Group
from sae.ops.sparse import SparseLatents
from sae.training import SparseAutoencoderModule
from sae.training.names import SINGLE

MOST_ROWS, MOST_ENTRIES = 131_072, 8_000_000
"""Held-out rows whose codes are looked at together, and entries of these codes, at most."""

Encode = Callable[[Float[Tensor, "rows d_model"]], SparseLatents]


class CodeScores(lightning.Callback):
    """Beside FVU and cross entropy, of the autoencoders and of every baseline at their L0:

    - `bits_per_token`: what the code costs to write down (`sae.ops.bits`),
    - `purity` and `purity_null`: what a firing says of the token, and by chance (`sae.inspection.purity`);
      null where rows were imported without tokens,
    - `cancellation`: the share of what the directions add that other directions take away again.
    """

    def __init__(self) -> None:
        self._own: dict[str, dict[str, float | None]] = {}
        self._baselines: dict[tuple[str, int], dict[str, float | None]] = {}
        self._at: dict[str, dict[str, tuple[str, int]]] = {}

    def metrics(self, name: str = SINGLE) -> dict[str, Any]:
        """What goes into metrics.json, beside the scores of the dictionary of that name."""
        if name not in self._own:
            return {}
        baselines = {baseline: self._baselines[at] for baseline, at in self._at[name].items()}
        return {**self._own[name], "baselines": baselines}

    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Codes the held-out rows by every method; ranks share them."""
        data: ActivationDataModule = trainer.datamodule  # pyright: ignore
        group = Group.of_training(pl_module.device)
        baselines = [c for c in trainer.callbacks if isinstance(c, BaselineCallback)]  # pyright: ignore
        for name, dictionary in pl_module.dictionaries.items():
            l0 = pl_module.held_out.scores[name].l0
            encode: Encode = partial(_encode, dictionary)
            self._own[name] = _scores(dictionary, encode, data, l0, pl_module.device, group)
            self._at[name] = {}
            for callback in baselines:
                k = callback.k_for(name)
                self._at[name][callback.name] = at = (callback.name, k)
                if at not in self._baselines:
                    of = callback.baseline_for(k)
                    encode = partial(of.sparse_code, k=k)
                    self._baselines[at] = _scores(of, encode, data, float(k), pl_module.device, group)


class _Coded(NamedTuple):
    """Held-out rows, coded; in the order of the text where that is known."""

    code: SparseLatents
    tokens: Int[Tensor, " rows"] | None


@torch.inference_mode()
def _scores(
    dictionary: Dictionary,
    encode: Encode,
    data: ActivationDataModule,
    l0: float,
    device: torch.device,
    group: Group,
) -> dict[str, float | None]:
    code, tokens = _coded(encode, data, int(min(MOST_ROWS, MOST_ENTRIES / max(l0, 1.0))), device, group)
    n = dictionary.n_latents
    signed = bool((code.values < 0).any())
    purity = None if tokens is None else token_purity(code, tokens, n, int(data.cache.token_ids.max()) + 1)
    cancellation, directions = Cancellation(), dictionary.directions.to(device)
    for begin in range(0, code.n_rows, 4096):
        offsets = code.row_offsets[begin : begin + 4097]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        part = SparseLatents(code.values[entries], code.indices[entries], offsets - offsets[0])
        cancellation.add(part, directions)
    return {
        "bits_per_token": bits_per_row(n, len(code.values) / max(code.n_rows, 1), signed),
        "purity": None if purity is None else purity.purity,
        "purity_null": None if purity is None else purity.null,
        "cancellation": cancellation.compute(),
    }


def _coded(
    encode: Encode, data: ActivationDataModule, most_rows: int, device: torch.device, group: Group
) -> _Coded:
    """Codes of the first held-out rows, those of all ranks, the same on each."""
    places, rows, values, indices, tokens = [], [], [], [], []
    n_mine, seen, context = 0, 0, data.cache.manifest.get("context_length")
    for batch in data.val_dataloader():
        code = encode(batch.x.to(device, torch.float32))
        place = torch.arange(n_mine, n_mine + len(batch.x)) + (group.rank << 40)
        if context and batch.sequence is not None and batch.position is not None:
            place = batch.sequence.long() * context + batch.position
            tokens.append(data.cache.token_ids[batch.sequence.long(), batch.position.long()].long())
        places.append(place)
        rows.append(code.rows.cpu() + n_mine)
        values.append(code.values)
        indices.append(code.indices)
        n_mine += len(batch.x)
        seen += data.batch_size  # of all ranks: each must end after the same batch
        if seen >= most_rows:
            break
    place = torch.cat(places)
    # In the order of the text, whoever coded it: then what follows does not depend on the number of ranks.
    of_entries, order = group.gather(place[torch.cat(rows)]).sort(stable=True)
    place, text = group.gather(place).sort()
    counts = torch.bincount(torch.searchsorted(place, of_entries), minlength=len(place))
    order = order.to(device)
    entries = [group.gather(torch.cat(column))[order] for column in (values, indices)]
    code = SparseLatents(*entries, F.pad(counts.cumsum(0), (1, 0)).to(device))
    return _Coded(code, group.gather(torch.cat(tokens))[text] if tokens else None)


def _encode(dictionary: Dictionary, x: Tensor) -> SparseLatents:
    return dictionary.encode_sparse(x.to(dictionary.directions.dtype))

"""How the learned directions lie, beside the model's tokens, PCA and chance; once, after the final test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations import ActivationDataModule
from sae.activations.language_model import language_model_of, unembedding
from sae.baselines import PCA
from sae.dictionaries import Dictionary
from sae.errors import InputError
from sae.ops.almost_orthogonal import largest_almost_orthogonal_subset, sizes_by_epsilon
from sae.ops.capacity import greedy_lower_bound, random_signs_lower_bound, upper_bound
from sae.ops.geometry import QUANTILES, Geometry, geometry_of, nearest_neighbour_null, random_rows
from sae.ops.sparse import SparseLatents
from sae.training import SparseAutoencoderModule
from sae.training.names import SINGLE

EPSILONS = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5]
_FEWEST, _CODED_ROWS, _BATCH = 2, 16_384, 2048


class DirectionGeometry(lightning.Callback):
    """Nearest neighbours, coherence, frame potential, ranks, co-firing, and almost-orthogonal sets.

    Of the latents that fire on held-out rows; beside them as many random directions, as many rows (drawn
    at random) of the token embedding and unembedding as there are such latents, about their mean, and PCA's
    basis. `almost_orthogonal` has, at each epsilon, the largest subset found with all |cos| < epsilon: a
    lower bound. In metrics.json as `geometry`; a page of the report shows it. The first rank does it alone.
    """

    def __init__(self, epsilons: list[float] | None = None, orders: int = 20) -> None:
        """Describes it.

        Args:
            epsilons: bounds on |cos|; null = from 0.1 to 0.5.
            orders: random orders in which sets are built, the largest counts.
        """
        self._epsilons = EPSILONS if epsilons is None else sorted(epsilons)
        for epsilon in self._epsilons:
            if not 0 < epsilon < 1:
                raise InputError(f"`epsilons` must be in (0, 1), got {epsilon}; they bound |cos|.")
        if orders < 1:
            raise InputError(f"`orders` must be at least 1, got {orders}.")
        self._orders = orders
        self._found: dict[str, dict[str, Any]] = {}

    def metrics(self, name: str = SINGLE) -> dict[str, Any]:
        """What goes into metrics.json, beside the scores of the dictionary of that name."""
        return {"geometry": self._found[name]} if name in self._found else {}

    @torch.inference_mode()
    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Measures every dictionary."""
        if not trainer.is_global_zero:
            return
        data: ActivationDataModule = trainer.datamodule  # pyright: ignore
        tokens = _token_rows(data, pl_module.device)
        for name, dictionary in pl_module.dictionaries.items():
            alive = (pl_module.held_out.densities[name] > 0).nonzero().squeeze(1)
            if len(alive) < _FEWEST or dictionary.d_model < 2:
                print(f"The geometry of {name} was not measured: {len(alive)} latents fire.", file=sys.stderr)
                continue
            self._found[name] = self._measured(dictionary, alive, data, tokens)

    def _measured(
        self, dictionary: Dictionary, alive: Tensor, data: ActivationDataModule, tokens: dict[str, Tensor]
    ) -> dict[str, Any]:
        directions, n, d = dictionary.directions[alive].float(), len(alive), dictionary.d_model
        generator = torch.Generator().manual_seed(0)
        mass = torch.zeros(dictionary.n_latents, dtype=torch.float64, device=directions.device)
        codes = list(_codes(dictionary, data))
        for code in codes:
            mass.index_add_(0, code.indices, code.values.abs().double())
        sets: dict[str, Geometry] = {
            "sae": geometry_of(directions, mass[alive], [_renumbered(code, alive) for code in codes]),
            "random": geometry_of(random_rows(n, d, generator).to(directions)),
            "pca": geometry_of(PCA(d).fit([], data.moments).directions.to(directions)),
        }
        for which, rows in tokens.items():
            sets[which] = geometry_of(
                rows[torch.randperm(len(rows), generator=generator)[:n].to(rows.device)]
            )
        sizes = sizes_by_epsilon(directions, self._epsilons, self._orders)
        return {
            "quantiles": list(QUANTILES),
            "null": nearest_neighbour_null(n, d).tolist(),
            "sets": {which: _plain(of) for which, of in sets.items()},
            "almost_orthogonal": [
                {
                    "epsilon": size.epsilon,
                    "found": size.found,
                    "random": size.random,
                    "pca": d,
                    **_tokens_at(tokens, size.epsilon, n, self._orders),
                    "random_signs_bound": random_signs_lower_bound(d, size.epsilon),
                    "greedy_bound": greedy_lower_bound(d, size.epsilon),
                    "upper_bound": _finite(upper_bound(d, size.epsilon)),
                }
                for size in sizes
            ],
        }


def _tokens_at(tokens: dict[str, Tensor], epsilon: float, n: int, orders: int) -> dict[str, int]:
    """The same of as many rows of the model's own matrices."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for which, rows in tokens.items():
        some = rows[torch.randperm(len(rows), generator=generator)[:n].to(rows.device)]
        found[which] = len(largest_almost_orthogonal_subset(some, epsilon, orders))
    return found


def _token_rows(data: ActivationDataModule, device: torch.device) -> dict[str, Float[Tensor, "rows d_model"]]:
    """W_E and W_U about their means, where the language model is at hand and as wide as the rows."""
    if data.cache.manifest.get("model") is None:  # imported rows
        return {}
    try:
        model = language_model_of(data.cache.manifest, device)
    except InputError as error:  # no reason to lose the rest
        print(f"The geometry of W_E and W_U was not measured: {error}", file=sys.stderr)
        return {}
    found = {}
    for which, matrix in (("W_E", model.model.get_input_embeddings().weight), ("W_U", unembedding(model))):
        if matrix is not None and matrix.shape[1] == data.d_model:
            rows = matrix.detach().to(device, torch.float32)
            rows = rows - rows.mean(0)  # what all tokens share says nothing of any
            norms = rows.norm(dim=1)
            found[which] = rows[norms > 1e-6 * norms.max()]
    return found


def _codes(dictionary: Dictionary, data: ActivationDataModule) -> Iterator[SparseLatents]:
    """Of the first held-out rows."""
    seen, directions = 0, dictionary.directions
    for batch in data.cache.batches("held_out", data.hookpoint, _BATCH):
        yield dictionary.encode_sparse(batch.x.to(directions))
        seen += len(batch.x)
        if seen >= _CODED_ROWS:
            return


def _renumbered(code: SparseLatents, alive: Tensor) -> SparseLatents:
    """The code on the living latents alone, which are all that fire."""
    return SparseLatents(
        code.values, torch.searchsorted(alive.to(code.indices), code.indices), code.row_offsets
    )


def _plain(of: Geometry) -> dict[str, Any]:
    """As JSON has it."""
    found = of._asdict()
    found["nearest"] = of.nearest.tolist()
    found["cofirings"] = None if of.cofirings is None else of.cofirings._asdict()
    return found


def _finite(bound: float) -> float | None:
    return bound if bound < float("inf") else None

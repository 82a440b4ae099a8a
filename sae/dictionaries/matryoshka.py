"""MatryoshkaBatchTopK: every prefix of the dictionary has to reconstruct by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sae.dictionaries.autoencoder import Reconstruction, TrainingCode
from sae.dictionaries.batch_topk import BatchTopK
from sae.errors import InputError
from sae.ops.mean_square import mean_square
from sae.ops.sparse import SparseLatents, sparse_decode


class MatryoshkaBatchTopK(BatchTopK):
    """BatchTopK whose first latents are a dictionary by themselves, and so on for wider prefixes.

    loss = mean over the widths m of |u - latents[:m] @ W_dec[:m] - b_dec|^2. A narrow prefix has no room
    for special cases, so general latents stay general: fewer are absorbed into their special cases.

    The prefixes' reconstructions are running sums of the parts between two widths, so all of them
    together cost one sparse product, as does their gradient.

    References:
        Learning Multi-Level Features with Matryoshka Sparse Autoencoders, Bussmann, Nabeshima, Karvonen
        and Nanda 2025, arXiv 2503.17547.
    """

    default_l0_start: ClassVar[float] = 1.0

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        k: int | float | None = None,
        widths: Sequence[int] | None = None,
        threshold_rate: float = 0.01,
    ) -> None:
        """Describes the kind.

        Args:
            d_model: width of the rows.
            n_latents: size of the dictionary.
            k: latents per row on average, over the whole dictionary; null where `model.target_l0` says it.
            widths: sizes of the prefixes, increasing; n_latents is added where it is missing. null = from
                a 32nd of n_latents, doubling.
            threshold_rate: see `BatchTopK`.

        Raises:
            InputError: for an argument out of range.
        """
        super().__init__(d_model, n_latents, k, threshold_rate)
        if widths is None:
            widths = sorted({-(-n_latents // 2**power) for power in range(6)})
        given = list(widths)
        widths = given if given and given[-1] == n_latents else [*given, n_latents]
        if not all(isinstance(width, int) for width in widths) or any(
            a >= b for a, b in zip([0, *widths], widths, strict=False)
        ):
            raise InputError(
                f"`widths` must increase from at least 1 to at most n_latents={n_latents}, in whole numbers,"
                f" got {given}."
            )
        self.widths = tuple(widths)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self.arguments(k=self.k, widths=list(self.widths), threshold_rate=self.threshold_rate)

    def reconstruct(self, u: Float[Tensor, "rows d_model"], code: TrainingCode) -> Reconstruction:
        """The loss is the mean over prefixes; the residual is that of all latents."""
        parts = sparse_decode(_by_part(code.latents, self.widths), self.W_dec)
        residuals = _LeftBy.apply(u - self.b_dec, parts.view(len(u), len(self.widths), -1))
        weighed = self.weigh(residuals.flatten(0, 1))
        energy = weighed.detach().unflatten(0, (-1, len(self.widths)))[:, -1].square().mean()
        return Reconstruction(residuals[:, -1], mean_square(weighed), energy)


class _LeftBy(torch.autograd.Function):
    """What the first part leaves of a row, what the second leaves of that, and so on: a plane after another.

    The same by `cumsum` along the parts goes down each column by itself, and takes half of a step.
    """

    @staticmethod
    def forward(
        ctx: Any, whole: Float[Tensor, "rows d_model"], parts: Float[Tensor, "rows parts d_model"]
    ) -> Float[Tensor, "rows parts d_model"]:
        left = torch.empty_like(parts)
        for i, part in enumerate(parts.unbind(1)):
            torch.sub(whole, part, out=left[:, i])
            whole = left[:, i]
        return left

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        of_parts, last = torch.empty_like(grad), grad.new_zeros(())
        for i in reversed(range(grad.shape[1])):
            last = torch.sub(last, grad[:, i], out=of_parts[:, i])
        return -of_parts[:, 0], of_parts


def _by_part(latents: SparseLatents, widths: Sequence[int]) -> SparseLatents:
    """The code with a row for each row and part between two widths; entries of a row ascend already."""
    ends = torch.tensor(widths, device=latents.indices.device)
    part = torch.bucketize(latents.indices, ends, right=True)
    virtual = latents.rows * len(widths) + part
    counts = virtual.new_zeros(latents.n_rows * len(widths)).scatter_add_(
        0, virtual, torch.ones_like(virtual)
    )
    by_latent = latents.by_latent
    if by_latent is not None:  # the same order, in which the rows are others
        by_latent = by_latent._replace(rows=virtual[by_latent.order])
    return latents._replace(row_offsets=F.pad(counts.cumsum(0), (1, 0)), by_latent=by_latent)

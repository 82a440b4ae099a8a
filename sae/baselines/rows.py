"""What fits that read rows share: mini-batches of one size, the first rows, the worst rows of a pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError
from sae.ops.group import Group

# Rows that a pass remembers as its worst, at most: what restarts need, and little beside the directions.
_REMEMBERED = 256


def require_several_passes(batches: Iterable[Tensor]) -> None:
    """Raises InputError if the batches can be read once only."""
    if iter(batches) is batches:
        raise InputError("`batches` must be re-iterable, got an iterator; give a list or a loader.")


def mini_batches(batches: Iterable[Tensor], size: int, like: Float[Tensor, " d_model"]) -> Iterator[Tensor]:
    """The rows `size` at a time however `batches` cuts them, the last ones fewer.

    Args:
        batches: Rows (rows, d_model), of any float dtype; none in a batch is allowed.
        size: Rows of a mini-batch.
        like: A row; mini-batches have its width and come to its device, in their own dtype.

    Raises:
        InputError: if there is no row, or rows are of another width or not finite.
    """
    held: list[Tensor] = []
    n_held, empty = 0, True
    for batch in batches:
        if batch.ndim != 2 or batch.shape[1] != len(like):
            raise InputError(
                f"`batches` must be of shape (rows, d_model={len(like)}), got {tuple(batch.shape)}; "
                "are they of another hookpoint or model?"
            )
        for rows in batch.split(size):
            held.append(rows.to(like.device))
            n_held += len(rows)
            if n_held >= size:
                joined = torch.cat(held)
                yield _finite(joined[:size])
                held, n_held, empty = [joined[size:]], n_held - size, False
    if n_held:
        yield _finite(torch.cat(held))
    elif empty:
        raise InputError("`batches` must give at least one row, got none.")


def first_rows(
    batches: Iterable[Tensor], n_rows: int, like: Float[Tensor, " d_model"]
) -> Float[Tensor, "rows d_model"]:
    """The first rows, all of them where there are fewer."""
    return next(mini_batches(batches, n_rows, like))


def count_rows(batches: Iterable[Tensor]) -> int:
    """Rows in one pass."""
    return sum(len(batch) for batch in batches)


class Worst:
    """The rows with the largest errors among those added, worst first; those without an error are none."""

    def __init__(self, most: int, like: Float[Tensor, " d_model"]) -> None:
        self._most = min(most, _REMEMBERED)
        self.rows, self._errors = like.new_zeros(0, len(like)), like.new_zeros(0)

    def add(self, rows: Float[Tensor, "rows d_model"], errors: Float[Tensor, " rows"]) -> None:
        """Takes rows and the error of each."""
        few = errors.topk(min(self._most, len(errors)))
        self._keep(torch.cat([self.rows, rows[few.indices]]), torch.cat([self._errors, few.values]))

    def join(self, group: Group) -> None:
        """The worst of all ranks, on each of them."""
        self._keep(group.gather(self.rows), group.gather(self._errors))

    def _keep(self, rows: Tensor, errors: Tensor) -> None:
        order = errors.argsort(descending=True, stable=True)[: self._most]
        order = order[errors[order] > 0]
        self.rows, self._errors = rows[order], errors[order]


def _finite(rows: Tensor) -> Tensor:
    if not rows.isfinite().all():
        raise InputError("`batches` must be finite, got NaN or infinite values; leave such rows out.")
    return rows

"""What is to be imported: arrays that fit together, cut into contexts, read context by context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from sae.activations.cache.encoding import Encoding
from sae.activations.cache.writer import Produce
from sae.activations.exchange.arrays import Array, describe
from sae.activations.exchange.spans import Spans, equal_lengths, runs_of_rows, sequences_of
from sae.errors import InputError
from sae.ops.int8 import outlier_coordinates

_ROWS_AT_ONCE = 4096
_SAMPLED_CONTEXTS = 32  # to find the coordinates that int8 has to keep apart
_LARGEST_ID = 2**31 - 1  # ids are kept as int32
_RESERVED = ("sequence", "position", "__metadata__")


@dataclass(frozen=True)
class RowsToImport:
    """Arrays of activations, and what belongs to their rows."""

    arrays: Mapping[str, Array]
    """By hookpoint: (rows, d_model), or (sequences, context, d_model)."""
    token_ids: Array | None
    spans: Spans
    in_sequences: bool
    """Whether the arrays have an axis of sequences."""
    options: Mapping[str, Any]

    @property
    def d_model(self) -> dict[str, int]:
        """Width of each hookpoint."""
        return {name: array.shape[-1] for name, array in self.arrays.items()}

    def identity(self) -> dict[str, Any]:
        """All that the contents of the cache depend on."""
        arrays = {name: array.identity() for name, array in self.arrays.items()}
        tokens = None if self.token_ids is None else self.token_ids.identity()
        return {"activations": arrays, "token_ids": tokens, **self.options}

    def encoding(self) -> Encoding:
        """How rows are stored; for int8, a few contexts show which coordinates stand apart."""
        if self.options["dtype"] != "auto":
            dtype = getattr(torch, self.options["dtype"])
        else:
            found = {array.dtype for array in self.arrays.values()}
            dtype = found.pop() if len(found) == 1 else torch.float32
            dtype = torch.float32 if dtype == torch.float64 else dtype
        if dtype != torch.int8:
            return Encoding(dtype)
        chosen = torch.linspace(0, self.spans.n_train - 1, _SAMPLED_CONTEXTS).long().unique().tolist()
        outliers = {}
        for name, array in self.arrays.items():
            sample = torch.cat([self.rows_of(array, sequence).float() for sequence in chosen])
            outliers[name] = outlier_coordinates(sample[sample.isfinite().all(-1)]).tolist()
        return Encoding(dtype, outliers)

    def rows_of(self, array: Array, sequence: int) -> Tensor:
        """The rows of one context, (length, d_model), or their tokens, (length,)."""
        if self.in_sequences:
            return array.read(sequence, sequence + 1)[0]
        return array.read(*self.spans.rows(sequence))

    def tokens_of(self, sequence: int) -> Int32[Tensor, " context"]:
        """The token ids of one sequence, padded with 0.

        Raises:
            InputError: if one cannot be a token id.
        """
        assert self.token_ids is not None
        found = self.rows_of(self.token_ids, sequence).long()
        if found.min() < 0 or found.max() > _LARGEST_ID:
            raise InputError(
                f"{self.token_ids.name}: token ids must lie in [0, {_LARGEST_ID:,}], sequence {sequence:,}"
                f" has {int(found.min()):,} to {int(found.max()):,}; is this the right array?"
            )
        padded = torch.zeros(self.spans.context_length, dtype=torch.int32)
        padded[: len(found)] = found
        return padded

    def producing(self, encoding: Encoding) -> Produce:
        """The function from contexts to their activations that a shard writer asks for."""
        dtype = encoding.dtype if encoding.is_plain else torch.float32
        at_once = max(1, _ROWS_AT_ONCE // self.spans.context_length)

        def produce(sequences: Int[Tensor, " sequences"]) -> Iterator[dict[str, Tensor]]:
            for some in sequences.split(at_once):
                yield {name: self._group(array, some, dtype) for name, array in self.arrays.items()}

        return produce

    def _group(self, array: Array, sequences: Int[Tensor, " some"], dtype: torch.dtype) -> Tensor:
        """Some contexts, (some, context, d_model), padded with zeros that are not stored."""
        group = torch.zeros(len(sequences), self.spans.context_length, array.shape[-1], dtype=dtype)
        for into, sequence in zip(group, sequences.tolist(), strict=True):
            rows = self.rows_of(array, sequence)
            into[: len(rows)] = rows
        if self.options["non_finite"] == "error" and not group.sum(dtype=torch.float32).isfinite():
            bad = (~group.isfinite().all(-1)).nonzero()
            if len(bad):
                self._refuse(array, int(sequences[bad[0, 0]]), int(bad[0, 1]), dtype)
        return group

    def _refuse(self, array: Array, sequence: int, position: int, dtype: torch.dtype) -> None:
        row = self.spans.rows(sequence)[0] + position
        place = f" (sequence {sequence}, position {position})" if self.spans.are_sequences else ""
        stored, hint = "", ""
        if bool(self.rows_of(array, sequence)[position].isfinite().all()):
            stored = f" as {str(dtype).removeprefix('torch.')}, whose largest value is"
            stored += f" {torch.finfo(dtype).max:.6g}"
            hint = " set `dtype` to float32 or bfloat16, or"
        raise InputError(
            f"{array.name}: row {row} is not finite{stored}{place};{hint} `non_finite` skip leaves such rows"
            " out and counts them."
        )


def describe_import(
    arrays: Mapping[str, Array],
    *,
    token_ids: Array | None,
    lengths: Array | None,
    context_length: int,
    held_out: float,
    dtype: str,
    non_finite: str,
    model: str | None,
) -> RowsToImport:
    """Checks that arrays fit together, and cuts them into contexts; see `import_activations`.

    Raises:
        InputError: saying what does not fit.
    """
    if context_length < 1:
        raise InputError(f"`context_length` must be at least 1, got {context_length}.")
    first = _check_arrays(arrays)
    in_sequences = len(first.shape) == 3
    n_rows = first.shape[0] * (first.shape[1] if in_sequences else 1)
    if token_ids is not None:
        _check_tokens(token_ids, first)
    if in_sequences:
        if lengths is not None:
            raise InputError(f"`lengths` is for rows in one piece; {first.name} is {describe(first)}.")
        spans = sequences_of(torch.full((first.shape[0],), first.shape[1]), held_out)
    elif lengths is not None:
        spans = sequences_of(_check_lengths(lengths, n_rows), held_out)
    elif token_ids is not None:
        spans = sequences_of(equal_lengths(n_rows, context_length), held_out)
    else:
        spans = runs_of_rows(n_rows, context_length, held_out)
    options = {
        "lengths": None if lengths is None else lengths.identity(),
        "context_length": context_length,
        "held_out": held_out,
        "dtype": dtype,
        "non_finite": non_finite,
        "model": model,
    }
    return RowsToImport(arrays, token_ids, spans, in_sequences, options)


def _check_arrays(arrays: Mapping[str, Array]) -> Array:
    """The first one; all are activations of the same rows."""
    for name, array in arrays.items():
        if not name or name in _RESERVED or name.endswith((".scale", ".outliers")):
            raise InputError(f"`hookpoint` must not be {name!r}, which has a meaning of its own in a cache.")
        if len(array.shape) not in (2, 3) or 0 in array.shape:
            raise InputError(
                f"{array.name} must be (rows, d_model) or (sequences, context, d_model), none of them 0; got"
                f" {array.shape}."
            )
        if not array.dtype.is_floating_point:
            raise InputError(
                f"{array.name} must hold floats, got {describe(array)}; is this the right array?"
            )
    first = next(iter(arrays.values()))
    for array in arrays.values():
        if array.shape[:-1] != first.shape[:-1]:
            raise InputError(
                f"{array.name} is {describe(array)}, {first.name} is {describe(first)}; hookpoints must have"
                " the same rows."
            )
    return first


def _check_tokens(token_ids: Array, activations: Array) -> None:
    if token_ids.dtype.is_floating_point or token_ids.dtype.is_complex or token_ids.dtype == torch.bool:
        raise InputError(f"`token_ids` must be integers, got {describe(token_ids)} in {token_ids.name}.")
    if token_ids.shape != activations.shape[:-1]:
        raise InputError(
            f"`token_ids` must be one for each row, of shape {activations.shape[:-1]} as {activations.name}"
            f" has, got {token_ids.shape} in {token_ids.name}."
        )


def _check_lengths(lengths: Array, n_rows: int) -> Int[Tensor, " sequences"]:
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or len(lengths.shape) != 1:
        raise InputError(
            f"`lengths` must be integers in one axis, got {describe(lengths)} in {lengths.name}."
        )
    found = lengths.read(0, len(lengths)).long()
    if len(found) and found.min() < 1:
        at = int(found.argmin())
        raise InputError(f"`lengths` must be at least 1, got {int(found[at])} at {at} in {lengths.name}.")
    if int(found.sum()) != n_rows:
        raise InputError(
            f"`lengths` must add up to the number of rows, {n_rows:,}, got {int(found.sum()):,} from"
            f" {len(found):,} sequences in {lengths.name}."
        )
    return found

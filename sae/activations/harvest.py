"""Running a language model over packed text and writing its residual stream into a cache."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from sae.activations.cache import (
    FORMAT,
    ActivationCache,
    Split,
    checksum,
    finish_cache,
    read_manifest,
    row_bytes,
    write_manifest,
    write_tensors,
)
from sae.activations.documents import read_documents
from sae.activations.hookpoints import check_hookpoints, residuals
from sae.activations.language_model import (
    LanguageModel,
    check_model_in_reach,
    load_language_model,
    vocabulary_hash,
    weights_hash,
)
from sae.activations.packing import PackedTokens, pack
from sae.activations.source import Source
from sae.errors import InputError
from sae.ops.moments import StreamingMoments

SHARD_BYTES = 256 * 2**20
"""Aim for the size of a shard, bytes."""
TOKENS_AT_ONCE = 4096
"""Tokens per forward pass, in whole contexts."""
_ORDER_SEED = 0  # the order on disk is part of the format, not of an experiment


class _PlannedShard(NamedTuple):
    file: str
    split: Split
    sequences: Int[Tensor, " sequences"]
    """Contexts in it, in the order they are run."""
    row_order: Int[Tensor, " rows"]
    """Row r of the shard is row `row_order[r]` of its contexts laid end to end."""


def harvest(source: Source, folder: Path, device: str = "cpu") -> ActivationCache:
    """Fills `folder` with the activations of `source`, or continues an interrupted harvest of it.

    Contexts are run in a random order and each shard's rows are permuted before they are written, so
    reading a shard from end to end already mixes contexts; held-out rows keep sequence order. Shards
    that an interrupted harvest finished are checked and kept.

    Raises:
        InputError: for anything wrong with the source, too little disk, or activations that are not
            finite.
    """
    source.check()
    check_model_in_reach(source.model)
    documents = read_documents(source.dataset)  # opens the text before gigabytes of weights are fetched
    language_model = load_language_model(source.model, device)
    check_hookpoints(language_model.model, source.hookpoints)
    _check_context_length(language_model, source.context_length)
    splits = pack(
        documents,
        language_model.tokenizer,
        n_tokens=source.n_tokens,
        context_length=source.context_length,
        held_out=source.held_out,
    )
    return _Harvest(source, folder, language_model, splits).run()


class _Harvest:
    """One harvest under way."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        language_model: LanguageModel,
        splits: tuple[PackedTokens, PackedTokens],
    ) -> None:
        self.source = source
        self.folder = folder
        self.model = language_model.model
        self.tokenizer = language_model.tokenizer
        self.token_ids = torch.cat([split.token_ids for split in splits])
        self.document_ids = torch.cat([split.document_ids for split in splits])
        self.n_train = len(splits[0].token_ids)
        _check_vocabulary(language_model, self.token_ids)
        self.d_model = self._probe()
        self.dtype = self.model.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
        self.moments = {name: StreamingMoments() for name in source.hookpoints}
        self.shards = self._plan()

    def run(self) -> ActivationCache:
        manifest = self._begin()
        done = {entry["file"]: entry for entry in manifest["shards"]}
        with tqdm(total=self.token_ids.numel(), desc="harvest", unit=" rows", unit_scale=True) as bar:
            for shard in self.shards:
                entry = done.get(shard.file)
                if entry is not None and self._keep(shard, entry):
                    bar.update(len(shard.row_order))
                    continue
                done[shard.file] = self._write(shard, bar)
                # What an earlier run finished stays listed, also if this one is interrupted too.
                manifest["shards"] = [done[s.file] for s in self.shards if s.file in done]
                write_manifest(self.folder, manifest)
        finish_cache(self.folder, manifest, {name: m.moments() for name, m in self.moments.items()})
        return ActivationCache(self.folder)

    def _probe(self) -> dict[str, int]:
        """Runs one context: the width at each hookpoint, and whether the model takes such contexts."""
        try:
            probe = residuals(self.model, self.token_ids[:1].long(), self.source.hookpoints)
        except (IndexError, RuntimeError) as error:
            raise InputError(
                f"{self.source.model} cannot run a context of `context_length`={self.source.context_length}"
                f" tokens ({str(error).splitlines()[0]}); lower it."
            ) from error
        return {name: x.shape[-1] for name, x in probe.items()}

    def _plan(self) -> list[_PlannedShard]:
        """Which contexts go into which shard, and the order of the rows in each: a pure function."""
        context = self.source.context_length
        per_shard = max(1, SHARD_BYTES // (row_bytes(self.d_model, self.dtype) * context))
        generator = torch.Generator().manual_seed(_ORDER_SEED)
        mixed = torch.randperm(self.n_train, generator=generator)
        kept = torch.arange(self.n_train, len(self.token_ids))
        planned: list[_PlannedShard] = []
        splits: tuple[tuple[Split, Tensor], ...] = (("train", mixed), ("held_out", kept))
        for split, sequences in splits:
            for chosen in sequences.split(per_shard):
                rows = len(chosen) * context
                order = torch.randperm(rows, generator=generator) if split == "train" else torch.arange(rows)
                planned.append(_PlannedShard(f"shard-{len(planned):05d}.safetensors", split, chosen, order))
        return planned

    def _begin(self) -> dict[str, Any]:
        """Checks the disk, writes the token files, and returns the manifest to continue from."""
        rows = self.token_ids.numel()
        needed = rows * (row_bytes(self.d_model, self.dtype) + 16)  # 16: token, document and order files
        self.folder.mkdir(parents=True, exist_ok=True)
        present = [path for path in self.folder.iterdir() if path.suffix != ".tmp"]
        if present and not (self.folder / "manifest.json").is_file():
            raise InputError(
                f"`cache` {self.folder} holds files but no activation cache; name a folder of its own."
            )
        free = shutil.disk_usage(self.folder).free + sum(path.stat().st_size for path in present)
        print(
            f"cache {self.folder}: {rows:,} rows of {', '.join(self.source.hookpoints)} as"
            f" {str(self.dtype).removeprefix('torch.')}, {_size(needed)} on disk, {_size(free)} free",
            flush=True,
        )
        if needed > free:
            raise InputError(
                f"the harvest needs {_size(needed)} in {self.folder}, {_size(needed - free)} more than is"
                " free; lower `n_tokens`, choose a smaller `dtype`, or another `cache` folder."
            )
        manifest = self._manifest()
        if (self.folder / "manifest.json").is_file():
            previous = read_manifest(self.folder)
            if previous["fingerprint"] == manifest["fingerprint"] and previous["files"]:
                return previous
        write_manifest(self.folder, manifest)  # first, so that the folder is known as ours
        manifest["files"] = self._write_token_files()
        write_manifest(self.folder, manifest)
        return manifest

    def _manifest(self) -> dict[str, Any]:
        rows = {"train": self.n_train, "held_out": len(self.token_ids) - self.n_train}
        model_hash = weights_hash(self.model)
        tokens_hash = checksum(self.token_ids.numpy().tobytes())
        return {
            "format": FORMAT,
            "finished": False,
            "source": asdict(self.source),
            "model": self.source.model,
            "model_hash": model_hash,
            "tokenizer": self.source.model,
            "vocabulary_hash": vocabulary_hash(self.tokenizer),
            "dataset": self.source.dataset,
            "tokens_hash": tokens_hash,
            "fingerprint": checksum(
                f"{asdict(self.source)} {model_hash} {tokens_hash} {self.d_model}".encode()
            ),
            "hookpoints": self.source.hookpoints,
            "d_model": self.d_model,
            "dtype": str(self.dtype).removeprefix("torch."),
            "context_length": self.source.context_length,
            "splits": {
                name: {"sequences": n, "rows": n * self.source.context_length} for name, n in rows.items()
            },
            "files": [],
            "shards": [],
        }

    def _write_token_files(self) -> list[dict[str, Any]]:
        context = self.source.context_length
        train = [shard for shard in self.shards if shard.split == "train"]
        order = torch.cat([_origin(shard, context) for shard in train])
        tokens = {"token_ids": self.token_ids, "document_ids": self.document_ids}
        return [
            write_tensors(self.folder / "sequences.safetensors", tokens),
            write_tensors(self.folder / "order.safetensors", {"order": order}),
        ]

    def _keep(self, shard: _PlannedShard, entry: dict[str, Any]) -> bool:
        """Whether an earlier run's shard is whole; if so its rows are counted into the moments."""
        path = self.folder / shard.file
        if not path.is_file() or checksum(path.read_bytes()) != entry["checksum"]:
            return False
        tensors = load_file(path)
        self._count(shard, {name: tensors[name] for name in self.source.hookpoints})
        return True

    def _write(self, shard: _PlannedShard, bar: tqdm) -> dict[str, Any]:
        parts: dict[str, list[Tensor]] = {name: [] for name in self.source.hookpoints}
        at_once = max(1, TOKENS_AT_ONCE // self.source.context_length)
        for sequences in shard.sequences.split(at_once):
            ids = self.token_ids[sequences].long()
            for name, x in residuals(self.model, ids, self.source.hookpoints).items():
                rows = rearrange(x, "sequence position d_model -> (sequence position) d_model")
                parts[name].append(rows.to("cpu", self.dtype))
            bar.update(ids.numel())
        tensors = {name: torch.cat(parts.pop(name))[shard.row_order] for name in self.source.hookpoints}
        self._check_finite(shard, tensors)
        self._count(shard, tensors)
        origin = _origin(shard, self.source.context_length)
        tensors["sequence"] = (origin // self.source.context_length).int()
        tensors["position"] = (origin % self.source.context_length).int()
        entry = write_tensors(self.folder / shard.file, tensors)
        return {"file": entry["file"], "split": shard.split, "rows": len(origin), **entry}

    def _check_finite(self, shard: _PlannedShard, tensors: dict[str, Tensor]) -> None:
        for name, x in tensors.items():
            bad = ~torch.isfinite(x).all(-1)
            if bad.any():
                row = int(bad.nonzero()[0])
                origin = int(_origin(shard, self.source.context_length)[row])
                sequence, position = divmod(origin, self.source.context_length)
                document = int(self.document_ids[sequence, position])
                raise InputError(
                    f"activations at {name} are not finite: shard {shard.file}, row {row} (sequence"
                    f" {sequence}, position {position}, document {document}), {int(bad.sum())} rows of the"
                    f" shard in all; if `dtype`={self.source.dtype} overflows, use bfloat16 or float32."
                )

    def _count(self, shard: _PlannedShard, tensors: dict[str, Tensor]) -> None:
        if shard.split == "train":
            for name, x in tensors.items():
                for rows in x.split(8192):
                    self.moments[name].add(rows)


def _origin(shard: _PlannedShard, context: int) -> Int[Tensor, " rows"]:
    """Of each row of a shard, sequence * context_length + position."""
    rows = (shard.sequences[:, None] * context + torch.arange(context)).flatten()
    return rows[shard.row_order]


def _check_context_length(language_model: LanguageModel, context_length: int) -> None:
    longest = getattr(language_model.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and context_length > longest:
        raise InputError(
            f"`context_length` must be at most {longest} for {language_model.name}, got {context_length}."
        )


def _check_vocabulary(language_model: LanguageModel, token_ids: Tensor) -> None:
    size = len(next(language_model.model.get_input_embeddings().parameters()))
    if int(token_ids.max()) >= size:
        raise InputError(
            f"the tokenizer of {language_model.name} gives token {int(token_ids.max())}, the model embeds"
            f" only {size}; are they a pair?"
        )


def _size(n_bytes: int) -> str:
    return tqdm.format_sizeof(n_bytes, "B")

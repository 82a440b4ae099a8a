"""Directions for TensorBoard's embedding projector, each with what is known of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from google.protobuf import text_format
from jaxtyping import Float
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor

from sae.files import write_atomically

MOST_POINTS = 5_000
"""More make the projector slow; of more, a sample is written."""
_FOLDER = "projector"


def write_projector(
    folder: Path,
    directions: Float[Tensor, "n_latents d_model"],
    names: list[list[str]],
    header: list[str],
    step: int,
) -> None:
    """Writes directions where TensorBoard's projector finds them, in place of those written before.

    Of more than 5,000 latents a uniform sample is written, the same one every time; the tag says so. No
    `SummaryWriter` is used: each adds an event file to the run, and keeps what it wrote to itself.

    Args:
        folder: the run folder; writes into its `tensorboard/`.
        directions: one row per latent.
        names: of each latent, a cell per column; tabs and line breaks become spaces.
        header: names of the columns.
        step: training step that the directions are of; part of the tag.
    """
    if len(names) != len(directions) or any(len(cells) != len(header) for cells in names):
        raise ValueError(f"`names` must hold {len(directions)} rows of {len(header)} cells.")
    shown = torch.arange(len(directions))
    tag = "directions"
    if len(directions) > MOST_POINTS:
        generator = torch.Generator().manual_seed(0)
        shown = torch.randperm(len(directions), generator=generator)[:MOST_POINTS].sort().values
        tag = f"directions ({MOST_POINTS:,} of {len(directions):,})"
    tensorboard = folder / "tensorboard"
    shutil.rmtree(tensorboard / _FOLDER, ignore_errors=True)
    (tensorboard / _FOLDER).mkdir(parents=True)
    points = directions.detach().cpu().float()[shown].tolist()
    _write_table(tensorboard / _FOLDER / "tensors.tsv", [[f"{x:.5g}" for x in row] for row in points])
    cells = [names[i] for i in shown.tolist()]
    # The projector takes a first line for a header only where there are several columns.
    _write_table(tensorboard / _FOLDER / "metadata.tsv", [header, *cells] if len(header) > 1 else cells)
    config = ProjectorConfig()
    embedding = config.embeddings.add()
    embedding.tensor_name = f"{tag}, step {step:,}"
    embedding.tensor_shape.extend([len(shown), directions.shape[1]])
    embedding.tensor_path = f"{_FOLDER}/tensors.tsv"
    embedding.metadata_path = f"{_FOLDER}/metadata.tsv"
    text = text_format.MessageToString(config)
    write_atomically(tensorboard / "projector_config.pbtxt", text.encode())


def _write_table(path: Path, rows: list[list[str]]) -> None:
    lines = ("\t".join(" ".join(cell.splitlines()).replace("\t", " ") for cell in row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

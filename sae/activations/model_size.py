"""How large a language model is, from its configuration alone: no weights are read or fetched."""

from __future__ import annotations

import re
import warnings
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModel

from sae.activations.hub import reason
from sae.activations.language_model import (
    DEMO_MODEL,
    _cannot_load,
    _quiet_transformers,
    check_model_in_reach,
    configured_dtype,
    find_blocks,
)
from sae.errors import InputError


class ModelSize(NamedTuple):
    """What can be known of a language model before it is loaded."""

    d_model: int
    """Width of the residual stream."""
    dtype: torch.dtype
    """Of the weights, as the configuration says; float32 where it says nothing."""
    parameters: int
    """Numbers in all weights, an unembedding of its own left out."""
    parameters_run: int
    """Those of the blocks up to the deepest hookpoint: two operations each for every token."""


def model_size(name: str, hookpoints: list[str]) -> ModelSize:
    """The size of `demo`, of a local folder's model or of a Hugging Face id's.

    Fetches the configuration if it is not here; the model is laid out without memory.

    Raises:
        InputError: if there is no such model, or it has no such hookpoint.
    """
    check_model_in_reach(name)
    try:
        with _quiet_transformers(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # initialising what has no data
            config = AutoConfig.from_pretrained(str(DEMO_MODEL) if name == "demo" else name)
            model = AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _cannot_load(name, reason(error, name, "model")) from error
    blocks = find_blocks(model)[1]
    depths = []
    for hookpoint in hookpoints:
        match = re.fullmatch(r"resid\.(\d+)", hookpoint)
        if match is None or int(match[1]) > len(blocks):
            raise InputError(
                f"`hookpoints`: {type(model).__name__} has no {hookpoint}; it has resid.0 to"
                f" resid.{len(blocks)}."
            )
        depths.append(int(match[1]))
    return ModelSize(
        d_model=config.get_text_config().hidden_size,
        dtype=configured_dtype(config),
        parameters=sum(p.numel() for p in model.parameters()),
        parameters_run=sum(p.numel() for block in blocks[: max(depths)] for p in block.parameters()),
    )

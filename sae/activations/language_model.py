"""Loading a transformers model and finding its parts through its module structure."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from sae.activations.hub import is_hub_id, reason, why_out_of_reach
from sae.errors import InputError

DEMO_MODEL = Path(__file__).parent / "demo_model"


class LanguageModel(NamedTuple):
    """A model and its tokenizer, in evaluation mode, without gradients."""

    name: str
    """The id or folder it was asked for by, or `demo`."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_language_model(
    name: str, device: str | torch.device = "cpu", random_weights: int | None = None
) -> LanguageModel:
    """Loads `demo`, a local folder or a Hugging Face id.

    The class follows the configuration: causal where it is a causal model, masked-LM where it is an
    encoder, bare otherwise. Weights keep the dtype they were saved in.

    Args:
        name: which.
        device: where to put it.
        random_weights: seed of weights drawn as its architecture begins a training; None = its own. They
            are not fetched then, and those drawn are of the dtype that the configuration says.

    References:
        Sparse Autoencoders Can Interpret Randomly Initialized Transformers, Heap et al. 2025,
        arXiv 2501.17727 (why random weights: what also comes of them was not learned by the model).

    Raises:
        InputError: if the model or its tokenizer cannot be loaded; the message says what to try.
    """
    check_model_in_reach(name)
    source = str(DEMO_MODEL) if name == "demo" else name
    try:
        with _quiet_transformers():
            # A model's own code is never run; unless told, transformers would ask on the terminal.
            safe: dict[str, Any] = {"trust_remote_code": False}
            config = AutoConfig.from_pretrained(source, **safe)
            kind = _model_class(config)
            if random_weights is None:
                model = kind.from_pretrained(source, config=config, dtype="auto", **safe)
            else:
                model = _drawn(kind, config, random_weights)
            tokenizer = AutoTokenizer.from_pretrained(source, **safe)
    except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError) as error:
        raise _cannot_load(name, reason(error, name, "model")) from error
    return LanguageModel(name, model.requires_grad_(False).eval().to(device), tokenizer)


def _drawn(kind: Any, config: Any, seed: int) -> Any:
    """The model with random weights: the same for a seed on every device, as they are drawn on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind.from_config(config, dtype=configured_dtype(config), trust_remote_code=False)


def configured_dtype(config: Any) -> torch.dtype:
    """The dtype of the weights as a model's configuration says; float32 where it says nothing."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_model_in_reach(name: str) -> None:
    """Raises `InputError` for a model that is neither here nor to be had; costs one small request.

    For use before anything long: a slow network passes, and shows itself in `load_language_model`.
    """
    if name == "demo" or Path(name).exists():
        return
    if not is_hub_id(name):
        raise _cannot_load(name, "there is no such folder")
    why = why_out_of_reach(name, "model")
    if why is not None:
        raise _cannot_load(name, why)


def language_model_of(
    manifest: Mapping[str, Any], device: str | torch.device = "cpu", elsewhere: str | None = None
) -> LanguageModel:
    """The language model that a cache was made with.

    Args:
        manifest: of the cache.
        device: where to put it.
        elsewhere: folder or id to load it from; None = the name in the manifest.

    Raises:
        InputError: if the cache's rows were imported, or the model cannot be loaded here, or has other
            weights or another vocabulary than the cache was made with.
    """
    name = manifest.get("model")
    if name is None:
        raise InputError(
            "the rows of the cache were imported or made up, and no language model is named for them; if one"
            " made them, import them with their token ids and --model to read latents."
        )
    source = manifest.get("source") or {}
    random_weights = source.get("random_weights")
    name = elsewhere or (name if random_weights is None else source["model"])
    language_model = load_language_model(name, device, random_weights)
    if weights_hash(language_model.model) != manifest["model_hash"]:
        raise InputError(
            f"the weights of {name} are not those that the cache was made with; harvest it again."
        )
    known = manifest.get("vocabulary_hash")  # caches of earlier versions have none
    if known is not None and vocabulary_hash(language_model.tokenizer) != known:
        raise InputError(
            f"the tokenizer of {name} has another vocabulary than the cache was made with; harvest it again."
        )
    return language_model


def weights_hash(model: nn.Module) -> str:
    """A hash of all parameters, names included: two models with equal hashes compute the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()[:32]}"


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all tokens with their numbers."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    digest = hashlib.sha256(json.dumps(pairs).encode())
    return f"sha256:{digest.hexdigest()[:32]}"


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks and its dotted name.

    It is the outermost `ModuleList` as long as the configuration's number of layers, whatever the
    architecture calls it.

    Raises:
        InputError: if there is none, or the model is an encoder-decoder.
    """
    text_config = model.config.get_text_config()
    n_layers = getattr(text_config, "num_hidden_layers", None)
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder; decoders and encoders are supported."
        )
    candidates = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not candidates:
        raise InputError(
            f"{type(model).__name__} has no list of {n_layers} blocks; only transformers whose blocks lie"
            " in one ModuleList are supported."
        )
    _, name, blocks = min(candidates, key=lambda candidate: candidate[0])
    return name, blocks


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm between the last block and the unembedding, or None if there is none.

    Found by running two tokens: the first module after the last block whose parameters are all vectors
    of width d_model. Where it is registered and what it is called differ between architectures.
    """
    blocks = find_blocks(model)[1]
    width = model.config.get_text_config().hidden_size
    ran: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        shapes = [tuple(p.shape) for p in module.parameters()]
        if module is blocks[-1]:
            ran.clear()
        elif shapes and all(shape == (width,) for shape in shapes):
            ran.append(module)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    return ran[0] if ran else None


def norm_gain(norm: nn.Module, d_model: int) -> Float[Tensor, " d_model"]:
    """The per-coordinate gain of a layer norm or RMS norm, measured rather than read.

    A vector of +1 and -1 in equal number is its own normalisation under both; so the gain is half the
    difference of the outputs at it and at its negative, over it. This holds for gains stored as
    weight or as 1 + weight alike.
    """
    probe = torch.ones(d_model)
    probe[::2] = -1.0
    parameter = next(norm.parameters())
    x = torch.stack([probe, -probe]).to(parameter)
    with torch.no_grad():
        plus, minus = norm(x).float().cpu()
    return (plus - minus) / 2 * probe


def causal_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that gives next-token logits; None for a model that predicts no next token."""
    if type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return None
    return model.get_output_embeddings()


def unembedding(language_model: LanguageModel) -> Float[Tensor, "vocabulary d_model"] | None:
    """W_U with the final norm's gain folded in and the vocabulary's mean row removed; float32.

    None for models without a causal head on the residual stream: an encoder's head is not a linear map
    of it, and some decoders project it to another width first. Soft-capping of logits (Gemma 2) is left
    out: it is monotone, so it keeps the order of the tokens.
    """
    model = language_model.model
    head = causal_head(model)
    if head is None:
        return None
    W_U = next(head.parameters()).detach().float().cpu()
    if W_U.shape[1] != model.config.get_text_config().hidden_size:
        return None
    norm = final_norm(model)
    if norm is not None:
        W_U = W_U * norm_gain(norm, W_U.shape[1])
    return W_U - W_U.mean(0)


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token put before every document: begin of sequence, else end, else separator or class.

    Raises:
        InputError: if the tokenizer has none of them.
    """
    for kind in ("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"):
        token_id = getattr(tokenizer, kind, None)
        if token_id is not None:
            return int(token_id)
    raise InputError("the tokenizer has no begin, end, separator or class token to put between documents.")


def _model_class(config: Any) -> Any:
    """The auto class of the head that the saved weights have; bare models get no random head."""
    saved_as = config.architectures or []
    for names, auto_class in (
        (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
        (MODEL_FOR_MASKED_LM_MAPPING_NAMES, AutoModelForMaskedLM),
    ):
        if set(saved_as) & set(names.values()):
            return auto_class
    return AutoModel


def _cannot_load(name: str, why: str) -> InputError:
    return InputError(
        f"`model` {name!r} could not be loaded: {why}. Give a folder with a transformers model and its"
        " tokenizer (--data.source.model FOLDER), `demo`, or another Hugging Face id."
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hides transformers' own progress bars and advice while loading; errors still raise."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

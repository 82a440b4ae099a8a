"""What tests share: seeds, a tiny language model with a byte tokenizer, a tiny cache."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae.activations import ActivationCache, Source, harvest


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Every byte is a token; token 256 separates documents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        bos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, byte_tokenizer):
    """Folder of a random GPT-2: d_model 16, 3 blocks, 257 tokens."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=16, n_layer=3, n_head=2, bos_token_id=256, eos_token_id=256
    )
    model = GPT2LMHeadModel(config)
    torch.nn.init.normal_(model.transformer.wpe.weight, std=0.5)
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.5)
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Eighty short documents."""
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    words = ["red", "green", "blue", "one", "two", "three", "sea", "hill", "river", "stone"]
    generator = torch.Generator().manual_seed(0)
    documents = [
        " ".join(words[i] for i in torch.randint(len(words), (40,), generator=generator)) for _ in range(80)
    ]
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture(scope="session")
def tiny_source(tiny_model, text_file):
    return Source(
        model=str(tiny_model),
        dataset=str(text_file),
        hookpoints=["resid.1", "resid.3"],
        n_tokens=8_000,
        context_length=32,
        held_out=0.2,
    )


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory, tiny_source) -> ActivationCache:
    """A finished cache of the tiny model."""
    return harvest(tiny_source, tmp_path_factory.mktemp("caches") / "tiny")

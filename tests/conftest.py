"""What tests share: seeds, a tiny language model with a byte tokenizer, a tiny cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(processes))))

import time

import jaxtyping
import pytest
import torch
import transformers
import yaml
from matplotlib.figure import Figure
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors_bytes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae.activations import ActivationCache, Source, harvest

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
GATED = SMALL | {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SMALL, intermediate_size=32, bos_token_id=0, eos_token_id=0)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GATED)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **SMALL, intermediate_size=32, num_key_value_heads=1, bos_token_id=0, eos_token_id=0
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=32)),
    "bare_roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**SMALL, intermediate_size=32, max_position_embeddings=40)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=40, word_embed_proj_dim=16)
    ),
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Says whether calls are checked, and skips long tests that would begin after SAE_TESTS_UNTIL.

    That is in seconds since 1970: CI has its limit. All this before any fixture, as those of a module are
    made in the set-up of its first test.
    """
    jaxtyping.config.update("jaxtyping_disable", item.get_closest_marker("shapes_unchecked") is not None)
    until = os.environ.get("SAE_TESTS_UNTIL")
    long = item.get_closest_marker("slow") or item.get_closest_marker("recipe")
    if until and long and time.time() > float(until):
        pytest.skip("SAE_TESTS_UNTIL is past")


@pytest.fixture(params=FAMILIES)
def family_model(request):
    """A random model of 3 blocks and d_model 16, of each family."""
    return FAMILIES[request.param]().eval()


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session", autouse=True)
def draw_figure():
    """Figures come out empty, as drawing them takes as long as a short run; returns what draws them."""
    with pytest.MonkeyPatch.context() as patch:
        draw = Figure.draw
        patch.setattr(Figure, "draw", lambda figure, renderer: None)
        yield draw


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


@pytest.fixture(scope="session")
def drop_rows():
    """Copies a cache without the rows that a mask, (sequences, context), leaves out."""

    def drop(cache, folder, cached) -> ActivationCache:
        shutil.copytree(cache.location, folder)
        manifest = json.loads((folder / "manifest.json").read_text())

        def rewrite(entry, tensors):
            data = to_safetensors_bytes(tensors)
            (folder / entry["file"]).unlink()
            (folder / entry["file"]).write_bytes(data)
            entry |= {"bytes": len(data), "checksum": f"sha256:{hashlib.sha256(data).hexdigest()}"}

        for split in manifest["splits"].values():
            split["rows"] = 0
        for entry in manifest["shards"]:
            tensors = load_file(folder / entry["file"])
            kept = cached[tensors["sequence"].long(), tensors["position"].long()]
            rewrite(entry, {name: tensor[kept] for name, tensor in tensors.items()})
            entry["rows"] = int(kept.sum())
            manifest["splits"][entry["split"]]["rows"] += entry["rows"]
        for entry in manifest["files"]:
            if entry["file"] == "sequences.safetensors":
                rewrite(entry, load_file(folder / entry["file"]) | {"cached": cached.to(torch.uint8)})
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return ActivationCache(folder)

    return drop


@pytest.fixture(scope="session")
def without_first(tmp_path_factory, tiny_cache, drop_rows) -> ActivationCache:
    """The tiny cache without position 0."""
    cached = torch.ones(tiny_cache.token_ids.shape, dtype=torch.bool)
    cached[:, 0] = False
    return drop_rows(tiny_cache, tmp_path_factory.mktemp("without-first") / "cache", cached)


@pytest.fixture(scope="session")
def write_config(tiny_cache, tiny_source):
    """Writes a whole configuration on the tiny cache, quick to run, into a folder; the run goes beside it."""

    def write(folder, seed=0, lr=None, **trainer):
        nmf = {"n_components": 8, "curve": [4], "max_rows": 2000}
        values = {
            "seed_everything": seed,
            "data": {
                "cache": str(tiny_cache.location),
                "source": {**tiny_source.__dict__},
                "hookpoint": "resid.1",
                "batch_size": 128,
            },
            "model": {
                "dictionary": {"class_path": "TopK", "init_args": {"n_latents": 32, "k": 4}},
                "lr": lr,
                "warmup_steps": 3,
            },
            "trainer": {
                "max_steps": 40,
                "default_root_dir": str(folder / "run"),
                "val_check_interval": 20,
                "check_val_every_n_epoch": None,
                "log_every_n_steps": 5,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [
                    {"class_path": "PCABaseline", "init_args": {"curve": [2, 8]}},
                    {"class_path": "NMFBaseline", "init_args": nmf},
                ],
                **trainer,
            },
        }
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write

"""The built-in model knows its language, on text it never saw."""

from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from sae.activations.demo_text import demo_documents
from sae.activations.language_model import DEMO_MODEL, load_language_model


@pytest.fixture(scope="module")
def demo():
    return load_language_model("demo")


def _nats(demo, ids):
    with torch.no_grad():
        logits = demo.model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.slow
def test_demo_model_predicts_held_out_documents_from_their_context(demo):
    texts = [document.text[:1200] for document in islice(demo_documents("demo"), 40)]
    encoded = demo.tokenizer(texts, verbose=False)["input_ids"]
    ids = torch.tensor([row[:128] for row in encoded if len(row) >= 128])
    in_order = _nats(demo, ids)
    shuffled = _nats(demo, ids[:, torch.randperm(128)])
    assert in_order < 3.5 and shuffled > in_order + 1.5, (in_order, shuffled)  # log(4,096) = 8.3


def test_demo_model_is_small_and_has_its_measurements_beside_it():
    assert (DEMO_MODEL / "model.safetensors").stat().st_size <= 8e6
    readme = (DEMO_MODEL / "README.md").read_text()
    assert "nats per token" in readme and "bits per character" in readme and readme.count("```text") == 3


def test_demo_tokenizer_gives_every_text_back(demo):
    for text in ("def f(x):\n    return x  # ünïcode 中\n", "  two  spaces\t"):
        assert demo.tokenizer.decode(demo.tokenizer(text)["input_ids"]) == text

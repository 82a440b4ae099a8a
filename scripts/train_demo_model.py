"""Trains the language model behind `model: demo` on the text of the running Python and its libraries.

    python scripts/train_demo_model.py --out sae/activations/demo_model --minutes 60
    python scripts/train_demo_model.py --out /tmp/tiny --minutes 1 --device cuda

A GPT-2 of four layers, d_model 128, 4,096 byte-level BPE tokens and a context of 256. It sees only
the `train` side of `sae.activations.demo_text`; loss, bits per character and continuations in the
written README.md come from the other side. Needs torch >= 2.9 for `torch.optim.Muon`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae.activations.demo_text import demo_documents

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096  # tokens
CONTEXT = 256  # tokens
PROMPTS = ("The function returns", "def read(self, ", "If the file does not exist, ")


def main() -> None:
    """Tokenizer, training, evaluation, README; everything lands in `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="training time; sets the schedule")
    parser.add_argument("--batch", type=int, default=16, help="contexts of 256 tokens per step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    texts = [document.text for document in demo_documents("train")]
    tokenizer = train_tokenizer(texts, args.out)
    ids = tokenize(tokenizer, texts)
    print(f"{len(texts):,} documents, {sum(map(len, texts)):,} characters, {len(ids):,} tokens", flush=True)

    model = new_model(tokenizer).to(args.device)
    tokens_seen = train(model, ids, args.minutes, args.batch)
    model.to("cpu", torch.float32).save_pretrained(args.out)

    held_out = [document.text for document in demo_documents("demo")]
    nats, bits = held_out_loss(model, tokenize(tokenizer, held_out), sum(map(len, held_out)))
    measured = {"minutes": args.minutes, "tokens_seen": tokens_seen, "nats": nats, "bits": bits}
    write_readme(args.out, model, tokenizer, shared=shared_lines(texts, held_out), **measured)
    print((args.out / "README.md").read_text())


def train_tokenizer(texts: list[str], out: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every text has an encoding and decoding gives it back exactly."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older transformers know too
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents in one row of ids, an end-of-text token before each."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    flat = [i for document in encoded for i in (tokenizer.eos_token_id, *document.ids)]
    return torch.tensor(flat, dtype=torch.int64)


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained GPT-2 of 1.4 M parameters with tied embeddings and no dropout."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new as one fused operation
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def train(model: GPT2LMHeadModel, ids: Tensor, minutes: float, batch: int) -> int:
    """Muon for the matrices of the blocks, AdamW for the rest; returns the tokens seen.

    The learning rate follows the share of `minutes` gone by: 2 % warm-up, then level, then linear to
    zero over the second half, so that a slower machine ends with a finished schedule too.
    """
    matrices = [p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not (".h." in n and p.ndim == 2)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    device = model.device
    begin = last_report = time.monotonic()
    running, step = math.nan, 0
    for x in batches(ids, batch):
        share = (time.monotonic() - begin) / (60 * minutes)
        if share >= 1.0:
            break
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, share / 0.02 + 0.01, 2.0 * (1.0 - share))
        with torch.autocast(device.type, torch.bfloat16):
            loss = next_token_loss(model, x.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if time.monotonic() - last_report > 20:
            last_report = time.monotonic()
            running = loss.item()
            print(
                f"{share:6.1%}  step {step:,}  tokens {step * x.numel():,}  loss {running:.3f} nats",
                flush=True,
            )
    return step * batch * CONTEXT


def batches(ids: Tensor, batch: int) -> Iterator[Tensor]:
    """Endless epochs of shuffled, non-overlapping contexts; the cutting points move every epoch."""
    while True:
        offset = int(torch.randint(CONTEXT, ()))
        rows = ids[offset : offset + (len(ids) - offset) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        for chosen in torch.randperm(len(rows)).split(batch)[:-1]:
            yield rows[chosen]


def next_token_loss(model: GPT2LMHeadModel, x: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy (nats) of every token but the first of its context, x (batch, CONTEXT)."""
    logits = model(x, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction=reduction)


@torch.inference_mode()
def held_out_loss(model: GPT2LMHeadModel, ids: Tensor, characters: int) -> tuple[float, float]:
    """Nats per token and bits per character over all documents of the demo side."""
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = sum(next_token_loss(model, x, reduction="sum").item() for x in rows.split(16))
    nats = total / (rows.numel() - len(rows))
    return nats, nats * len(ids) / characters / math.log(2)


def shared_lines(train_texts: list[str], held_out: list[str]) -> float:
    """Share of the held-out characters that lie in lines (of 40 or more) which training texts have too."""

    def long_lines(texts: list[str]) -> Iterator[str]:
        return (line for text in texts for line in map(str.strip, text.splitlines()) if len(line) >= 40)

    known = set(long_lines(train_texts))
    shared = sum(len(line) for line in long_lines(held_out) if line in known)
    return shared / sum(map(len, long_lines(held_out)))


def write_readme(
    out: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, **measured: float
) -> None:
    """What the model is and what was measured, continuations included."""
    torch.manual_seed(0)
    parameters = sum(p.numel() for p in model.parameters())
    samples = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        text = model.generate(
            **ids, max_new_tokens=80, do_sample=True, temperature=0.7, top_k=50, pad_token_id=0
        )
        samples.append("```text\n" + tokenizer.decode(text[0]).replace("```", "'''") + "\n```")
    (out / "README.md").write_text(
        f"""# The demo model

GPT-2 architecture: 4 layers, d_model 128, 4 heads, {VOCABULARY:,} byte-level BPE tokens, context {CONTEXT};
{parameters:,} parameters in float32. Written by `scripts/train_demo_model.py`, trained for
{measured["minutes"]:g} minutes ({measured["tokens_seen"]:,} tokens) on docstrings, comments and help
topics of Python's standard library and of this package's dependencies. Documents are split by a hash
of their name; `dataset: demo` is the side that it never saw.

| held-out documents | |
| --- | --- |
| loss | {measured["nats"]:.3f} nats per token |
| compression | {measured["bits"]:.3f} bits per character |
| characters in lines of 40 or more that a training document has too | {measured["shared"]:.1%} |

Three continuations (temperature 0.7, top 50), as they came:

{chr(10).join(samples)}
"""
    )


if __name__ == "__main__":
    main()

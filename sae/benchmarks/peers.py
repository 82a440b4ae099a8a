"""The same training step by public trainers, where they are installed.

Each is driven as its own trainer drives it, from rows in memory, without its logging: TopK, no dead latents.
`pip install eai-sparsify dictionary-learning sae-lens`, into an environment of their own: they are particular
about versions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sae.benchmarks.cases import Case
from sae.benchmarks.steps import LR

Peer = Callable[[Tensor], object]


def installed(case: Case) -> Iterator[tuple[str, Peer]]:
    """Names and steps of those that can be imported."""
    makes = {"eai-sparsify": _sparsify, "dictionary-learning": _dictionary_learning, "sae-lens": _sae_lens}
    for name, make in makes.items():
        torch.manual_seed(0)
        try:
            step = make(case)
        except ImportError:
            continue
        yield name, step


def _sparsify(case: Case) -> Peer:
    if case.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else it looks for a GPU where Triton is installed
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    config = SparseCoderConfig(num_latents=case.n_latents, k=case.k)
    coder = SparseCoder(case.d_model, config, device=case.device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR, fused=True)
    fired = torch.zeros(case.n_latents, dtype=torch.bool, device=case.device)

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=None)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32).backward()
        nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _dictionary_learning(case: Case) -> Peer:
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    trainer = TopKTrainer(
        steps=10**6, activation_dim=case.d_model, dict_size=case.n_latents, k=case.k, layer=0, lm_name="",
        lr=LR, device=case.device,
    )  # fmt: skip
    done = 0

    def step(x: Tensor) -> None:
        nonlocal done
        done += 1  # its first step finds a median of the rows, once
        trainer.update(done, x)

    return step


def _sae_lens(case: Case) -> Peer:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]

    config = TopKTrainingSAEConfig(
        d_in=case.d_model, d_sae=case.n_latents, k=case.k, device=case.device, normalize_activations="none"
    )
    trained = TopKTrainingSAE(config)
    optimizer = torch.optim.Adam(trained.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        trained.training_forward_pass(given).loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step

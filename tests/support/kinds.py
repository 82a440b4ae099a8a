"""Small autoencoders of every kind with nothing left at its start value, for tests of what they compute."""

import torch

from sae.dictionaries import Dictionary
from sae.dictionaries.linear_encoder import LinearEncoder
from sae.dictionaries.penalised import Penalised
from sae.ops.moments import StreamingMoments

D, N, K = 7, 30, 3


def rows(n=60, seed=3):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=generator)
    return (torch.randn(n, D, generator=generator) @ mixing * 3 + 5).double()


def moments(x):
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


@torch.no_grad()
def make(kind, scaled=True, whiten=False, **arguments):
    """In float64; biases, gains and thresholds drawn, about K latents firing per row."""
    torch.manual_seed(0)
    cls = Dictionary.kinds[kind]
    if not arguments:
        arguments = {"sparsity_coefficient": 0.3} if issubclass(cls, Penalised) else {"k": K}
    dictionary = cls(D, N, **arguments).double()
    if scaled:
        of_rows = moments(rows())
        dictionary.set_input_statistics(of_rows.mean, of_rows.mean_squared_norm)
        if whiten:
            dictionary.set_whitening(of_rows.covariance)
    if isinstance(dictionary, LinearEncoder):
        dictionary.W_enc_rows += 0.1 * torch.randn(N, D)
        dictionary.b_enc.normal_(std=0.1)
    dictionary.b_dec.normal_(std=0.1)
    if isinstance(dictionary, Penalised):
        dictionary.b_enc.sub_(1.0)
    if kind == "Gated":
        dictionary.r_mag.normal_(std=0.3)
        dictionary.b_mag.normal_(std=0.3)
    if kind == "JumpReLU":
        dictionary.threshold.uniform_(0.1, 0.9)
    if "TopK" in kind and kind != "TopK":
        dictionary.threshold.fill_(1.1)
        dictionary.weight.fill_(1.0)
    dictionary.constrain()  # rows drawn in float32 are of norm one only to its rounding
    return dictionary

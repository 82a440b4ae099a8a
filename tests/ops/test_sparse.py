"""The sparse products equal the dense ones, values and gradients; with kernels and without."""

import pytest
import torch
from ops.conftest import SWITCHES

from sae.errors import InputError
from sae.ops.selection import top_k
from sae.ops.sparse import SparseLatents, from_dense, sparse_decode, sparse_pre_acts

ROWS, D, N, K = 7, 5, 11, 3


@pytest.fixture(autouse=True, params=SWITCHES)
def kernels(request, with_kernels):
    with_kernels(request.param)


@pytest.fixture
def weights():
    torch.manual_seed(1)
    W_enc, W_dec = torch.randn(N, D, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
    b_enc, x = torch.randn(N, dtype=torch.float64), torch.randn(ROWS, D, dtype=torch.float64)
    return x, W_enc.requires_grad_(), b_enc.requires_grad_(), W_dec.requires_grad_()


def _sparse(x, W_enc, b_enc, W_dec, k=K):
    with torch.no_grad():
        pre_acts = x @ W_enc.T + b_enc
    code = sparse_pre_acts(x, W_enc, b_enc, top_k(pre_acts, k))
    return sparse_decode(code._replace(values=code.values.relu()), W_dec)


def _dense(x, W_enc, b_enc, W_dec, k=K):
    pre_acts = x @ W_enc.T + b_enc
    chosen = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(k).indices, 1.0)
    return (pre_acts.relu() * chosen) @ W_dec


@pytest.mark.parametrize("k", [1, K, N])
def test_sparse_autoencoder_equals_dense_values_and_gradients(weights, k):
    target = torch.randn(ROWS, D, dtype=torch.float64)
    results = []
    for f in (_sparse, _dense):
        x_hat = f(*weights, k=k)
        grads = torch.autograd.grad((x_hat - target).square().sum(), weights[1:])
        results.append([x_hat, *grads])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def test_sparse_autoencoder_equals_dense_in_float32_to_1e_5():
    x, W_enc, b_enc, W_dec = torch.randn(64, 32), torch.randn(128, 32), torch.randn(128), torch.randn(128, 32)
    weights = [w.requires_grad_() for w in (W_enc, b_enc, W_dec)]
    grads = [torch.autograd.grad(f(x, *weights, k=8).square().mean(), weights) for f in (_sparse, _dense)]
    for ours, reference in zip(*grads, strict=True):
        assert (ours - reference).norm() <= 1e-5 * reference.norm()


def test_sparse_gradients_pass_finite_differences(weights):
    # Small steps do not change which latents are chosen, so the function is smooth here.
    assert torch.autograd.gradcheck(lambda *w: _sparse(weights[0], *w), weights[1:], eps=1e-7, atol=1e-5)


def test_latents_that_no_row_chose_get_no_gradient(weights):
    x, W_enc, b_enc, W_dec = weights
    code = SparseLatents(
        torch.ones(ROWS, dtype=torch.float64), torch.full((ROWS,), 4), torch.arange(ROWS + 1)
    )
    sparse_decode(sparse_pre_acts(x, W_enc, b_enc, code), W_dec).sum().backward()
    others = torch.arange(N) != 4
    for grad in (W_enc.grad, W_dec.grad):
        assert grad[others].abs().max() == 0 and grad[4].abs().min() > 0
    assert b_enc.grad[others].abs().max() == 0


def test_top_k_takes_the_largest_by_hand():
    code = top_k(torch.tensor([[1.0, 5.0, -2.0, 3.0], [-1.0, -4.0, -2.0, -3.0]]), 2)
    dense = code.to_dense(4)
    assert dense.tolist() == [[0.0, 5.0, 0.0, 3.0], [-1.0, 0.0, -2.0, 0.0]]
    assert code.row_offsets.tolist() == [0, 2, 4]


def test_from_dense_then_to_dense_is_identity_with_empty_rows():
    latents = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    code = from_dense(latents)
    assert code.row_offsets.tolist() == [0, 1, 1, 3] and code.rows.tolist() == [0, 2, 2]
    assert torch.equal(code.to_dense(3), latents)


def test_without_zeros_keeps_the_code():
    latents = torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 3.0]])
    code = SparseLatents(latents.flatten(), torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([0, 2, 4, 6]))
    assert torch.equal(code.without_zeros().to_dense(2), latents)
    assert code.without_zeros().values.tolist() == [2.0, 1.0, 3.0]


def test_decode_of_rows_of_different_length_equals_dense():
    latents = torch.randn(6, N).relu()
    latents[2] = 0
    W_dec = torch.randn(N, D)
    torch.testing.assert_close(sparse_decode(from_dense(latents), W_dec), latents @ W_dec)


def test_no_tensor_of_entries_times_width_is_made(weights):
    """Neither forward nor backward may allocate (rows * k, d_model)."""
    rows, d, n, k = 512, 64, 256, 16
    x, W_enc, W_dec = torch.randn(rows, d), torch.randn(n, d), torch.randn(n, d)
    W_enc.requires_grad_(), W_dec.requires_grad_()
    b_enc = torch.zeros(n, requires_grad=True)
    shapes = _ShapeLog()
    with shapes:
        _sparse(x, W_enc, b_enc, W_dec, k=k).sum().backward()
    assert max(shapes.sizes) <= rows * n  # the encoder's own pre-activations
    assert (rows * k, d) not in shapes.shapes


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_code_spread_among_rows_that_were_not_coded_has_nothing_there(share):
    dense = torch.rand(20, N) * (torch.rand(20, N) < 0.3)
    present = torch.rand(20) < share
    spread = from_dense(dense[present]).spread(present)
    assert spread.n_rows == 20
    assert torch.equal(spread.to_dense(N), dense * present[:, None])


class _ShapeLog(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the shape of every dense tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes, self.sizes = set(), {0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.shapes.add(tuple(tensor.shape))
                self.sizes.add(tensor.numel())
        return out


@pytest.mark.parametrize(
    ("indices", "offsets", "said"),
    [
        ([0, 5], [0, 2], r"in \[0, n_latents=5\), got 0 to 5: is this the code of another"),
        ([-1, 2], [0, 2], r"got -1 to 2"),
        ([1], [0, 1], "as many `values` as `indices`, got 2 and 1"),
        ([1, 2], [0, 1], r"must rise from 0 to the 2 entries, got \[0, 1\]"),
        ([1, 2], [0, 3, 2], "must rise"),
        ([1, 2], [], "must rise"),
    ],
)
def test_a_code_that_is_none_is_refused(indices, offsets, said):
    code = SparseLatents(torch.ones(2), torch.tensor(indices), torch.tensor(offsets, dtype=torch.int64))
    with pytest.raises(InputError, match=said):
        code.check(5)
    SparseLatents(torch.ones(2), torch.tensor([4, 0]), torch.tensor([0, 2, 2])).check(5)

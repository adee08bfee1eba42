"""Every attention against its formula in float64 NumPy, head by head."""

import numpy as np
import pytest
import torch
from sizes import mechanism
from test_normalizers import formula

from salvit_core.models.attention import ATTENTION

B, N, M, H, S = 2, 5, 8, 2, 3
D = M // H


def build(name, normalizer="softmax", **extra):
    torch.manual_seed(0)
    module = mechanism(name, M, H, N, normalizer=normalizer, **extra).double().eval()
    x = torch.randn(B, N, M, dtype=torch.float64)
    return module, x, {key: value.detach().numpy() for key, value in module.state_dict().items()}


def heads(x):
    """(B, N, M) -> (B, H, N, D)."""
    return x.reshape(B, N, H, D).transpose(0, 2, 1, 3)


def merge(x):
    """(B, H, N, D) -> (B, N, M)."""
    return x.transpose(0, 2, 1, 3).reshape(B, N, M)


@pytest.mark.parametrize("normalizer", ["softmax", "2quad", "2relu", "l2q", "scaling"])
def test_self_attention(normalizer):
    module, x, w = build("self", normalizer)
    q, k, v = (heads(x.numpy() @ part.T) for part in np.split(w["qkv.weight"], 3))
    weights = formula(normalizer, q @ k.transpose(0, 1, 3, 2) / np.sqrt(D), -1)
    expected = merge(weights @ v) @ w["projection.weight"].T + w["projection.bias"]
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalizer", ["softmax", "2quad", "2relu", "l2q", "scaling"])
def test_external_attention(normalizer):
    module, x, w = build("external", normalizer, memory=S)
    q = heads(x.numpy() @ w["query.weight"].T)
    weights = formula(normalizer, q @ w["scores.weight"].T, -2)
    if normalizer != "scaling":
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-9)
    values = weights @ w["values.weight"].T @ w["projection.weight"].T + w["projection.bias"]
    np.testing.assert_allclose(module(x).detach().numpy(), merge(values + q), rtol=1e-9, atol=1e-12)


def test_scaling_attention():
    module, x, w = build("scaling")
    q, k, v = (heads(x.numpy() @ part.T) for part in np.split(w["qkv.weight"], 3))
    values = (q / np.sqrt(N)) @ (k.transpose(0, 1, 3, 2) @ v / np.sqrt(N))
    expected = merge(values) @ w["projection.weight"].T + w["projection.bias"]
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_scaling_attention_is_self_attention_with_a_linear_normaliser():
    """(Q K^T) V / N = Q (K^T V) / N, up to self-attention's extra 1 / sqrt(D)."""
    linear, x, _ = build("scaling")
    quadratic = mechanism("self", M, H, N, normalizer="scaling").double().eval()
    quadratic.load_state_dict(linear.state_dict())
    quadratic.projection.bias.data.zero_()
    linear.projection.bias.data.zero_()
    torch.testing.assert_close(linear(x), quadratic(x) * D**0.5)


@pytest.mark.parametrize("name", ["self", "scaling", "external"])
def test_permuting_tokens_permutes_the_output(name):
    module, x, _ = build(name)
    order = torch.randperm(N)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])


@pytest.mark.parametrize("name", ATTENTION)
def test_gradients(name):
    module, x, _ = build(name, "l2q")
    assert torch.autograd.gradcheck(module, x.requires_grad_(), atol=1e-6)


def test_dropout_only_in_training():
    module, x, _ = build("self", attention_dropout=0.5)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_normaliser_options_reach_the_attention():
    module = mechanism("self", M, H, N, normalizer="l2q", l2q_granularity="head")
    assert module.normalizer.c.shape == (1, H, 1, 1)

"""Quadratic activations: what they compute, and that a network learns with them."""

import pytest
import torch

from salvit_core import CCT, cost, preset
from salvit_core import datasets as data
from salvit_core.models.activations import LearnedQuad, Quad
from salvit_core.training import Recipe, train


def test_quad_is_the_published_polynomial():
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(Quad()(x), 0.125 * x**2 + 0.25 * x + 0.5)


def test_learned_quad_starts_there_and_differs_by_unit():
    module = LearnedQuad(3).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(module(x), Quad()(x))
    assert torch.autograd.gradcheck(module, x)
    module(x).sum().backward()
    assert all(parameter.grad.shape == (3,) and parameter.grad.abs().min() > 0 for parameter in module.parameters())


@pytest.mark.parametrize("activation", ["quad", "learned_quad"])
def test_a_network_learns_with_it(activation):
    torch.manual_seed(0)
    net = CCT(preset("cct_2_3x1", activation=activation))
    result = train(net, data.load("digits"), Recipe(epochs=6, batch=64, lr=2e-3, augment="none"))
    assert result["test_accuracy"] > 60  # chance is 10
    if activation == "learned_quad":
        learnt = net.blocks[0].mlp.activation
        assert (learnt.a - Quad.coefficients[0]).abs().max() > 1e-3


def test_costs_and_refusal():
    plain, quad = (CCT(preset("cct_2_3x1", activation=name)) for name in ("gelu", "learned_quad"))
    units = 2 * 2 * 32  # two layers, two units per dimension
    assert cost.parameters(quad) - cost.parameters(plain) == 3 * units
    assert cost.flops(quad) - cost.flops(plain) == 3 * units * plain.config.tokens  # four operations for GELU's one
    with pytest.raises(ValueError, match="activation 'relu' is unknown: choose from gelu"):
        preset("cct_2_3x1", activation="relu")

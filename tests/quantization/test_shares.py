"""Quantized networks as secret shares run them: the same function, and what tables in place of functions cost."""

import dataclasses

import pytest
import torch
from torch import nn

from salvit_core import CCT, build, preset, private
from salvit_core.models.operations import Lookup, ShiftDivide
from salvit_core.quantization.engine import Quantization, quantize
from salvit_core.quantization.layers import folded
from salvit_core.quantization.shares import on_shares, tabulated

OPTIONS = Quantization(bits_weights=4, reconstruction=False)


def lively(model):
    """With statistics as a trained network has them: every channel of size one after its norm."""
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(64, model.config.channels, model.config.image, model.config.image))
        model.head.expand.weight *= 30  # else LayerNorm's variances are below what shares hold
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lively(build(preset("efficientvit_test")))


@pytest.fixture(scope="module")
def quantized(model, images):
    return quantize(model, images, OPTIONS)["network"]


def test_with_its_quantizers_it_is_the_same_function(quantized, images):
    with torch.no_grad():
        torch.testing.assert_close(on_shares(quantized, True)(images), quantized(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [OPTIONS, Quantization(activations=False, reconstruction=False)])
def test_without_them_its_weights_are_the_quantized_ones(model, images, options):
    """Migration and shift are undone exactly: with no quantizer on they change nothing."""
    network = quantize(model, images, options)["network"]
    plain = on_shares(network)
    for module in network.modules():
        if hasattr(module, "on"):
            module.on = False
    divides = [module for module in plain.modules() if isinstance(module, ShiftDivide)]
    assert len(divides) == (1 if options.activations else 0)
    with torch.no_grad():
        if not divides:
            torch.testing.assert_close(plain(images), network(images), atol=1e-4, rtol=1e-4)
        weight = plain.get_submodule("blocks.0.expand.conv").weight.flatten(1)
    assert all(len(row.unique()) <= 2**options.bits_weights for row in weight)


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="network is Linear: give a quantized EfficientViT"):
        on_shares(nn.Linear(2, 2))


def test_tables_stand_for_the_functions(model, images):
    graph = tabulated(model, images, 10)
    tables = [module for module in graph.modules() if isinstance(module, Lookup)]
    assert {table.function for table in tables} == {"hardswish", "relu"}
    assert not any(isinstance(module, nn.Hardswish | nn.ReLU) for module in graph.modules())
    with torch.no_grad():
        fine = (graph(images) - model(images)).abs().max()
        coarse = (tabulated(model, images, 4)(images) - model(images)).abs().max()
    assert fine < 0.05 < coarse
    few = tabulated(model, images, 10, most=300)
    assert 0 < sum(isinstance(module, Lookup) for module in few.modules()) < len(tables)


def test_a_network_with_gelu_has_tables_of_it():
    images = torch.randn(4, 1, 8, 8)
    graph = tabulated(CCT(preset("cct_2_3x1")), images)
    assert {module.function for module in graph.modules() if isinstance(module, Lookup)} == {"gelu", "relu"}


def test_what_tables_save_and_cost(model, images):
    """A round in place of four for every function, and 2^K words a number: of these alone the dealer sends more."""
    before, after = (private.estimate(each, (1, 1, 8, 8)) for each in (model, tabulated(model, images, 8)))
    assert after.rounds < before.rounds and after.bytes < before.bytes
    assert after.dealer_bytes > 10 * before.dealer_bytes


def test_quantized_weights_cost_what_others_do(model, quantized, images):
    """But for the log2 divisor, which takes fewer rounds than a reciprocal."""
    divided = quantize(model, images, dataclasses.replace(OPTIONS, log2=False))["network"]
    plain, few, shifted = (
        private.estimate(each, (1, 1, 8, 8)) for each in (folded(model), on_shares(divided), on_shares(quantized))
    )
    assert plain.operations.equals(few.operations)
    assert shifted.rounds < few.rounds and shifted.bytes < few.bytes


@pytest.mark.processes
def test_both_on_shares(model, quantized, images):
    exact, *tables = on_shares(quantized), tabulated(model, images, 10), on_shares(quantized, True)
    for network, bound in ((exact, 0.03), *((each, 0.2) for each in tables)):  # tables round to either neighbour
        result = private.infer(network, images[:2], "tuned")
        with torch.no_grad():
            clear = network(images[:2])
        assert result.violations == [] and (result.logits - clear).abs().max() < bound * clear.std()

"""Searches among any mechanisms, each with a price, within a budget for all layers."""

import dataclasses
import itertools

import pytest
import torch
from test_sas import RECIPE, count, stirred

from salvit_core import CCT, preset
from salvit_core.search import sas
from salvit_core.search.priced import ChoiceCCT, PricedPenalty, PricedSearch, afford, search

CHOICES, PRICES = ("self", "external", "scaling"), (3.0, 2.0, 1.0)


def test_a_layer_of_choices_is_their_weighted_sum():
    torch.manual_seed(0)
    net = stirred(ChoiceCCT(preset("cct_2_3x1", normalizer="l2q"), CHOICES))
    layer, x = net.blocks[0].attention, torch.randn(3, 16, 32)
    parts = [layer.self_attention(x), layer.external_attention(x), layer.scaling_attention(x)]
    torch.testing.assert_close(layer(x), sum(a * part for a, part in zip(layer.alpha, parts)))
    assert net.alphas().shape == (2, 3)


@pytest.mark.parametrize("chosen", [("scaling", "self"), ("external", "scaling")])
def test_extraction_from_choices_computes_what_the_frozen_mixture_computes(chosen):
    torch.manual_seed(0)
    net = stirred(ChoiceCCT(preset("cct_2_3x1", normalizer="l2q"), CHOICES))
    final = sas.extract(net, chosen)
    sas.freeze(net, chosen)
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(final.eval()(images), net(images), rtol=0, atol=1e-5)
    assert final.config.attention == chosen
    assert count(final) == count(CCT(final.config))


def test_the_l1_term_is_weighted_by_prices():
    net = ChoiceCCT(preset("cct_2_3x1"), CHOICES)
    term = PricedPenalty(net, 0.5, PRICES)()
    assert term.item() == pytest.approx(0.5 * 2 * (3 + 2 + 1) / 3 / 2)  # alpha 1/3, mean price 2, two layers
    term.backward()
    for block in net.blocks:
        torch.testing.assert_close(block.attention.alpha.grad, 0.5 * torch.tensor(PRICES) / 2)


def test_the_best_affordable_architecture_is_found():
    """Against all architectures, one by one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        alphas, prices = torch.randn(4, 3, generator=generator), torch.rand(3, generator=generator).add(0.1).tolist()
        budget = 4 * min(prices) + torch.rand((), generator=generator).item()
        found = afford(alphas, CHOICES, prices, budget)
        best = -1.0
        for picks in itertools.product(range(3), repeat=4):
            if sum(prices[i] for i in picks) <= budget:
                best = max(best, sum(alphas[layer, i].abs().item() for layer, i in enumerate(picks)))
        picks = [CHOICES.index(name) for name in found]
        assert sum(prices[i] for i in picks) <= budget * (1 + 1e-9)
        assert sum(alphas[layer, i].abs().item() for layer, i in enumerate(picks)) == pytest.approx(best)


def test_a_budget_for_everything_takes_the_largest_alphas():
    alphas = torch.tensor([[0.1, -0.9, 0.2], [0.5, 0.1, 0.2]])
    assert afford(alphas, CHOICES, PRICES, 6.0) == ("external", "self")
    assert afford(alphas, CHOICES, PRICES, 2.0) == ("scaling", "scaling")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: afford(torch.ones(2, 3), CHOICES, PRICES, 1.9), "budget 1.9 cannot be met: 2 layers cost"),
        (lambda: afford(torch.ones(2, 3), CHOICES, (1.0, 2.0), 9), "do not fit 3 choices"),
        (lambda: afford(torch.ones(2, 3), CHOICES, (1.0, 2.0, -1.0), 9), "one positive number for each"),
        (lambda: afford(torch.ones(2, 2), CHOICES, PRICES, 9), r"alphas have shape \(2, 2\): give \(layers, 3\)"),
        (lambda: ChoiceCCT(preset("cct_2_3x1"), ("self", "self")), "two or more different mechanisms"),
        (lambda: ChoiceCCT(preset("cct_2_3x1"), ("self", "sand")), "attention 'sand' is unknown"),
        (lambda: sas.mixed(preset("vit_2")), "ViTConfig is of another network"),
        (lambda: PricedPenalty(ChoiceCCT(preset("cct_2_3x1"), CHOICES), 0.1, (1.0, 2.0)), "do not fit 3 choices"),
        (lambda: PricedSearch(preset("cct_2_3x1"), RECIPE, RECIPE, 0, CHOICES), "do not fit 3 choices"),
        (lambda: PricedSearch(preset("cct_2_3x1"), RECIPE, RECIPE, 0, CHOICES[:1], (1.0,)), "two or more different"),
    ],
)
def test_choices_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_search_among_three_within_a_budget(digits, tmp_path):
    run = PricedSearch(preset("cct_2_3x1", normalizer="l2q"), RECIPE, RECIPE, 0, CHOICES, PRICES, 4.0)
    found = search(run, digits, folder=tmp_path)
    assert found["architecture"] == afford(found["alphas"], CHOICES, PRICES, 4.0)
    assert sum(PRICES[CHOICES.index(name)] for name in found["architecture"]) <= 4.0
    assert found["network"].config.attention == found["architecture"]
    assert found["test_accuracy"] > 20
    assert search(run, digits, folder=tmp_path)["test_accuracy"] == found["test_accuracy"]
    with pytest.raises(ValueError, match="cannot be met"):
        search(dataclasses.replace(run, budget=1.0), digits, folder=tmp_path)

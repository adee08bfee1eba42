"""Networks that others wrote on shares: right against the network itself, at the cost that the estimate says.

A network and its parties take seconds to a minute: two run always, the others with -m slow.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from others import NETWORKS, made
from test_functionality import failure, failures
from test_private_efficient import privately
from test_private_tuned import arithmetic, looks_random, whole
from torch import nn

from salvit_core import adopt, cost, private, training
from salvit_core import datasets as data
from salvit_core.cli import main
from salvit_core.models.activations import TanhGELU
from salvit_core.models.operations import Repeat
from salvit_core.private import LINKS
from salvit_core.private.estimation import estimate
from salvit_core.private.parties import launch
from salvit_core.private.tuned import protocol as tuned
from salvit_core.private.tuned.arithmetic import ring

QUICK = ("mobilenet_v3_small", "efficientvit_b0")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NETWORKS]
COLUMNS = ["layer", "kind", "rounds", "bytes", "offline_bytes"]


@pytest.mark.processes
@pytest.mark.parametrize("name", EVERY)
def test_a_network_of_others_is_right_on_shares(name):
    network, image = made(name)
    result = private.infer(network, image, "tuned")
    assert result.faithful, (result.error, result.margin, result.violations)
    # Of logits of standard deviation 2. Rounding grows in deep networks of random weights.
    assert result.margin > 0.3 and result.doubt < 0.1 and 0 < result.error < 0.15
    assert result.operations[COLUMNS].equals(estimate(network, image.shape).operations[COLUMNS])


class Small(nn.Module):
    """What a user may write: shapes at run time, a class token, attention of torch.nn, BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.token = nn.Parameter(torch.randn(1, 1, 8) / 4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        x = self.stem(images)
        batch, channels, height, width = x.shape
        assert height == width
        x = x.reshape(batch, channels, height * width).permute(0, 2, 1)
        x = torch.cat((self.token.expand(batch, -1, -1), x), dim=1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x))[:, 0])


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return Small().eval()


@pytest.mark.processes
def test_the_same_network_with_a_dealer_in_two_queries_and_with_its_label_alone(small):
    images = torch.randn(3, 1, 8, 8)
    result = private.infer(small, images, "tuned", "TTP", batch=2, drift=True)
    assert result.faithful and result.drift["error"].max() < 0.02
    named = private.infer(small, images, "tuned", reveal="label", check=True)
    assert named.violations == [] and torch.equal(named.labels, result.labels)


@pytest.mark.processes
def test_stock_runs_it_too(small):
    result = private.infer(small, torch.randn(1, 1, 8, 8), "stock")
    table = estimate(small, (1, 1, 8, 8), "stock").operations
    assert result.operations[COLUMNS].equals(table[COLUMNS])
    # Its GELU and inverse roots are out of their domain, and it says where.
    assert all(line.startswith(("attention", "mlp", "norm", "normalizer")) for line in result.violations)


def test_an_estimate_says_what_a_swap_saves(small):
    graph = adopt(small, torch.randn(2, 1, 8, 8))
    cheap = adopt(small, torch.randn(2, 1, 8, 8), softmax="2quad", gelu="quad")
    found = [estimate(network, (1, 1, 8, 8)) for network in (small, graph, cheap)]
    assert found[0].operations.equals(found[1].operations)
    assert found[2].rounds < found[1].rounds and found[2].bytes < found[1].bytes
    kinds = found[0].operations.groupby("kind", observed=True)["rounds"].sum()
    assert {"convolution", "normaliser", "projection", "LayerNorm", "activation", "head"} <= set(kinds.index)


def test_a_tensor_for_every_image_costs_nothing(small):
    graph = adopt(small, torch.randn(2, 1, 8, 8))
    assert any(isinstance(module, Repeat) for module in graph.modules())
    table = estimate(small, (1, 1, 8, 8)).operations
    assert table[table["layer"] == "token"]["bytes"].sum() == 0


def test_what_others_wrote_is_refused_before_any_process_starts(monkeypatch):
    monkeypatch.setattr(launch, "bear", lambda *a, **k: pytest.fail("a process was started"))
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.ELU()).eval()
    with pytest.raises(ValueError, match=r"softplus \(2\): relu could stand in for it;\n.*elu \(3\): relu or silu"):
        private.infer(network, torch.randn(1, 1, 8, 8), "tuned")


def test_flops_and_parameters_are_those_of_the_network():
    network, image = made("mobilenet_v3_small")
    graph = adopt(network, image)
    folded = sum(part.num_features for part in network.modules() if isinstance(part, nn.BatchNorm2d))
    assert cost.parameters(graph) == cost.parameters(network) - folded  # a scale and a shift become a bias
    assert cost.flops(network, "torch", image) == cost.flops(graph, "torch", image)


@pytest.mark.processes
def test_what_was_swapped_is_trained_and_then_evaluated_on_shares(small):
    """A checkpoint in; the private-friendly variant, fine-tuned; its accuracy on shares beside that in the clear."""
    torch.manual_seed(0)
    digits = data.load("digits")
    graph = adopt(small, torch.randn(2, 1, 8, 8), softmax="2quad", gelu="quad")
    recipe = training.Recipe(epochs=2, batch=64, lr=3e-3, augment="none", distill_logits=0.5)
    found = training.train(graph, digits, recipe, teacher=small)
    assert found["history"][1]["loss"] < found["history"][0]["loss"]
    with pytest.raises(ValueError, match="what the head of a network that others wrote reads has no name"):
        training.train(graph, digits, dataclasses.replace(recipe, distill_features=1.0), teacher=small)
    private_accuracy = private.evaluate(graph, digits, n=4, batch=4)
    assert private_accuracy["agreement"] == 100 and private_accuracy["violations"] == []


def test_the_command_line_estimates_a_network_of_torchvision(capsys):
    main(["estimate", "--torchvision", "resnet18", "--image", "64", "--link", "WAN"])
    said = capsys.readouterr().out
    assert "convolution" in said and "total" in said and "WAN (Cheetah) adds" in said
    main(["estimate", "--torchvision", "resnet18", "--image", "64", "--link", "WAN (Cheetah)", "--softmax", "2quad"])
    assert capsys.readouterr().out.splitlines()[0] == said.splitlines()[0]
    for words, message in {
        ("--torchvision", "resnet"): "torchvision has no network 'resnet'",
        ("--torchvision", "vit_b_16", "--image", "225"): "image is 225, which vit_b_16 does not take",
        ("--torchvision", "resnet18", "--link", "moon"): f"link 'moon' is unknown: choose from {', '.join(LINKS)}",
        ("--softmax", "2quad"): "softmax and gelu stand in for those of --torchvision",
    }.items():
        with pytest.raises(SystemExit, match=message.replace("(", r"\(").replace(")", r"\)")):
            main(["estimate", *words])


# Gates, with two threads as parties


def varied():
    """Every operation that only networks of others have, on values as wide as theirs."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish(), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU()),
        *(nn.Conv2d(8, 8, 1, groups=2), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Tanh()),
        *(nn.Conv2d(8, 8, 1), nn.ReLU6(), nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 8, 1), nn.GELU("tanh")),
        *(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 8, 1), nn.Hardsigmoid(), nn.Conv2d(8, 8, 1)),
        *(nn.Hardtanh(-2.0, 1.0), nn.Conv2d(8, 8, 1), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data.normal_(0, (2 / part.weight[0].numel()) ** 0.5)
    graph = adopt(network, torch.randn(2, 3, 32, 32))
    graph.config = SimpleNamespace(channels=3, image=32)
    return graph


def test_failures_of_the_new_gates_are_no_likelier_than_stated():
    found = failures(varied())
    kinds = {"Hardtanh", "LeakyReLU", "Hardswish", "Hardsigmoid", "SiLU", "Sigmoid", "Tanh", "TanhGELU", "Resample"}
    assert kinds <= set(found)
    beyond = {kind for kind, (count, expected) in found.items() if expected > count * failure(kind)}
    assert not beyond


@arithmetic
@given(
    side=st.integers(1, 8), more=st.integers(0, 3), kernel=st.tuples(*[st.integers(1, 3)] * 2),
    stride=st.tuples(*[st.integers(1, 3)] * 2), padding=st.tuples(*[st.integers(0, 2)] * 2),
    dilation=st.tuples(*[st.integers(1, 3)] * 2), groups=st.integers(1, 4), channels=st.integers(1, 3),
    outputs=st.integers(1, 3), bits=st.sampled_from([8, 64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_convolution_in_groups_is_that_of_torch(
    side, more, kernel, stride, padding, dilation, groups, channels, outputs, bits, seed
):
    """In the ring, exactly, for small weights and for those that take all 64 bits."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    assume(side + 2 * padding[0] >= reach[0] and side + more + 2 * padding[1] >= reach[1])
    images = whole((2, groups * channels, side, side + more), -99, 99, seed)
    weight = whole((groups * outputs, channels, *kernel), -99, 99, seed + 1)
    operation = ("grouped", kernel, stride, padding, dilation, groups)
    exact = nn.functional.conv2d(images.double(), weight.double(), None, stride, padding, dilation, groups)
    exact = exact.flatten(2).transpose(1, 2).long()
    assert torch.equal(ring.apply(operation, images, weight, bits), exact)
    assert torch.equal(ring.apply(operation, images, ring.prepared(operation, weight, bits)), exact)
    if groups == 1:
        plain = ("conv", kernel, stride, padding, dilation)
        assert torch.equal(ring.apply(plain, images, weight, bits), exact)


@pytest.mark.parametrize(
    "module",
    [
        *(nn.ReLU6(), nn.LeakyReLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.SiLU(), nn.Sigmoid(), nn.Tanh()),
        *(TanhGELU(), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 3, groups=8)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_messages_look_random(module):
    _, _, parties = privately(module, torch.ones(1, 64, 12, 12))
    for party in parties[:1] if isinstance(module, nn.Conv2d) else parties:
        assert looks_random(party.audit)


@pytest.mark.parametrize(
    "module, inside, outside",
    [
        (nn.ReLU6(), 60.0, 70.0),
        (nn.Hardtanh(-2.0, 3.0), -60.0, -64.0),
        (nn.LeakyReLU(), -55.0, -60.0),
        (nn.Hardswish(), 55.0, 60.0),
        (nn.Hardsigmoid(), -55.0, -60.0),
        (nn.SiLU(), -47.0, -50.0),
        (nn.Sigmoid(), 47.0, 50.0),
        (nn.Tanh(), 47.0, 50.0),
        (TanhGELU(), 27.0, 29.0),
    ],
    ids=lambda what: type(what).__name__ if isinstance(what, nn.Module) else str(what),
)
def test_every_range_is_watched(module, inside, outside):
    watch = tuned.DOMAINS[type(module)]
    assert not watch(module, torch.tensor([inside]))[0].outside
    assert watch(module, torch.tensor([outside]))[0].outside
    for value, bits in ((inside, 13), (inside, 10)):
        shared, clear, parties = privately(module, torch.full((4,), value), bits=bits, check=True)
        assert not any(party.violations for party in parties)
        assert (shared - clear).abs().max() <= 2.0 ** (3 - bits) + 2e-3
    _, _, parties = privately(module, torch.full((4,), 2 * outside), check=True)
    assert all(party.violations for party in parties)


class Ratio(nn.Module):
    """A division as in linear attention, kept from zero by an eps."""

    def forward(self, x):
        return (x / (x.square().sum(-1, keepdim=True) + 2.0**-14)).flatten(1)


def test_what_a_division_costs_does_not_depend_on_the_values_that_sized_it():
    """An estimate has shapes alone: what it counts is what runs, whatever example a network was adopted with."""
    example = torch.randn(2, 3, 4, 4)
    adopted = [adopt(Ratio(), factor * example) for factor in (1e-3, 1.0, 30.0)]
    assert len({module.scale for graph in adopted for module in graph.modules() if hasattr(module, "scale")}) == 3
    costs = [estimate(each, (1, 3, 4, 4)) for each in (Ratio(), *adopted)]
    assert len({(each.rounds, each.bytes, each.dealer_bytes) for each in costs}) == 1

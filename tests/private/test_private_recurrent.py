"""Recurrences on shares: gates against the clear operations, errors along the sequence, rounds and words by formula.

The protocols of `tuned` run with two threads as parties, as in test_private_tuned.
"""

import math

import pytest
import torch
from test_private_efficient import privately
from test_private_tuned import looks_random, on_grid, opened, polynomial, random_like_trained, raw, together, whole

from salvit_core import build, preset, private
from salvit_core.models.operations import LSTM, BlockLinear, LinearScan
from salvit_core.private.tuned import gates
from salvit_core.private.tuned import protocol as tuned
from salvit_core.private.tuned.arithmetic import ring
from salvit_core.private.tuned.arithmetic.share import Share
from salvit_core.replacement.pruning import shaped

ULP = 2.0**-13


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def drawn(module, seed=0, scale=1.0):
    """Weights as torch draws an LSTM's, `scale` times as wide, and biases likewise, on the fixed point's grid."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        width = max(1, *module.cells) ** -0.5 if isinstance(module, LSTM) else 0.5
        parameter.data = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * width * scale
    return on_grid(module).double()


# What the gate is made of


@pytest.mark.parametrize("bits", [8, 11])
def test_the_logistic_function_in_integers(bits):
    """Within 1.1e-4 and what the rounding of coefficients takes, also a quarter beyond every knot."""
    pieces = gates.lstm._pieces(bits)
    x = torch.arange(-48 * 2**bits, 48 * 2**bits + 1, 3)
    value = x.double() / 2**bits
    assert ((polynomial(pieces, x) - value.sigmoid()).abs() <= 1.3e-4).all()
    for i, knot in enumerate(pieces.knots):
        assert knot % 2 ** (bits - gates.lstm.QUARTER) == 0
        x = torch.arange(knot - 2 ** (bits - 2), knot + 2 ** (bits - 2) + 1)
        for neighbour in (i, i + 1):
            assert ((polynomial(pieces, x, neighbour) - (x.double() / 2**bits).sigmoid()).abs() <= 1.3e-4).all()


@pytest.mark.parametrize("bits", [10, 13, 16])
def test_the_logistic_function_on_shares(bits):
    x = torch.cat([torch.linspace(-47.9, 47.9, 3001), torch.linspace(-11, 11, 3001)]).double()
    integers = (x * 2.0**bits).round().long()
    results, parties = together(gates.lstm.logistic, (integers, bits), bits=bits)
    error = (opened(results) - (integers / 2.0**bits).sigmoid()).abs()
    # x is rounded to 11 bits or one less than there are, and the slope is at most 1 / 4.
    assert error.max() <= 1.3e-4 + 2.0 ** -min(bits - 1, 11) / 4 + 1e-9
    assert [party.rounds for party in parties] == [2, 2] and raw(results).max() < 2**61


@pytest.mark.parametrize("seed", range(3))
def test_products_of_what_is_truncated_on_the_way(seed):
    """Each factor within a unit of the exact one's floor, for all that is below 2^62; the product exact of these."""
    size = 2**62 - 1 if seed else 2**58
    f, i, g = (whole((40, 3), -size, size, seed + 7 * n) for n in range(3))
    c = whole((40, 3), -(2**16), 2**16, seed + 50)

    def play(f, i, g, c):
        return gates.lstm.cut_product(i, g, 13), gates.lstm.gated_sum(f, Share(c.data, 13), i, g, 13)

    results, parties = together(play, *((x, 60) for x in (f, i, g, c)))
    product, total = (raw(pair) for pair in zip(*results, strict=True))
    low = [x >> 47 for x in (f, i, g)]
    options = [(low[1] + p) * (low[2] + q) for p in (0, 1) for q in (0, 1)]
    assert torch.stack([product == option for option in options]).any(0).all()
    sums = [option + c * (low[0] + p) for option in options for p in (0, 1)]
    assert torch.stack([total == option for option in sums]).any(0).all()
    assert parties[0].rounds == 2


# Gates against the clear operations

BLOCKS = {
    "alike": ((4, 4, 4), (3, 3, 3)),
    "not alike": ((1, 5, 0), (4, 0, 2)),
    "one": ((300,), (3,)),
    "none in": ((0, 0), (3, 3)),
    "none out": ((3, 3), (0, 0)),
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("sizes", BLOCKS.values(), ids=BLOCKS)
def test_block_linear(sizes, native, monkeypatch):
    """Whether torch multiplies int64 or float64."""
    monkeypatch.setattr(ring, "NATIVE", native)
    module = drawn(BlockLinear(*sizes))
    shared, clear, parties = privately(module, normal(2, 5, sum(sizes[0]), scale=6))
    assert shared.shape == clear.shape
    if all(map(sum, sizes)):
        assert (shared - clear).abs().max() <= 2.0**-40 and clear.abs().max() > 1
    elif clear.numel():
        assert (shared - clear).abs().max() <= 2.0**-40  # the bias alone
    assert [party.rounds for party in parties] == [1, 1]


HIDDEN = {"as drawn": [(8, 8)] * 2, "pruned": [(5, 1), (0, 8), (3, 2)], "one way": [(16, 0)], "none": [(0, 0)]}


@pytest.mark.parametrize("bits", [10, 13, 16])
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_lstm(hidden, bits):
    module = drawn(LSTM(hidden))
    z = normal(2, 3, 12, 4 * sum(module.cells), scale=2)
    shared, clear, parties = privately(module, z, bits=bits)
    if not clear.numel():
        return
    assert (shared - clear).abs().max() <= 2e-3 + 2.0 ** (2 - bits) and clear.abs().max() > 0.5
    assert [party.rounds for party in parties] == [7 * 12 - 1] * 2


# How wide weights are (1: as torch draws them), and what is added to the inputs of forget gates: f is about 0.98 with
# 4, so that a state keeps the errors of 50 steps, and 0.999 with 7. Largest errors of 16, 64 and 256 steps, 32 hidden
# units and 4 sequences: twice the worst of many draws of masks, or more (`gates.lstm.lstm` says what is usual)
ALONG = {
    "as drawn": (1.0, 0.0, (1e-3, 1.2e-3, 1.4e-3)),
    "wide weights": (3.0, 0.0, (2e-3, 2e-3, 2.5e-3)),
    "slow to forget": (1.0, 4.0, (2e-3, 3.5e-3, 4e-3)),
    "all but a counter": (1.0, 7.0, (2e-3, 6e-3, 2.5e-2)),
}


@pytest.mark.parametrize("name", ALONG)
def test_the_error_along_the_sequence_is_bounded(name):
    scale, more, bounds = ALONG[name]
    module = drawn(LSTM([(16, 16)]), scale=scale)
    z = normal(4, 256, 4 * 32, scale=2)
    for cell in (0, 64):
        z[..., cell + 16 : cell + 32] += more  # what the forget gates read
    shared, clear, _ = privately(module, z)
    error = (shared - clear).abs()
    error = torch.cat([error[..., :16], error[..., 16:].flip(1)], -1).amax((0, 2))  # by step
    worst = [error[:steps].max().item() for steps in (16, 64, 256)]
    assert all(seen <= bound for seen, bound in zip(worst, bounds, strict=True)), worst
    assert clear.abs().max() > 0.5
    # From some step on it does not grow any more, unless next to nothing is ever forgotten.
    growth = error[192:].mean() / error[32:64].mean()
    assert growth > 1.5 if name == "all but a counter" else growth < 2


@pytest.mark.parametrize("sizes", [(3, 2), (0, 5), (5, 0)])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 64, 256])
def test_scan(count, sizes):
    f, i = torch.rand(2, 3, count, 5, generator=torch.Generator().manual_seed(0)).double(), normal(2, 3, count, 5)
    f[..., :2] = 1 - f[..., :2] / 64  # some remember
    shared, clear, parties = privately(LinearScan(*sizes), f, (1 - f) * i)
    levels = math.ceil(math.log2(count))
    # A step of the fixed point for every level, of h and of f, which multiplies what h is at most.
    assert (shared - clear).abs().max() <= ULP * (1 + 2 * levels) * (1 + clear.abs().max())
    assert [party.rounds for party in parties] == [levels] * 2


@pytest.mark.parametrize("name", ["lstm", "scan", "blocks"])
def test_messages_look_random(name):
    module, inputs = {
        "lstm": (drawn(LSTM([(16, 8)])), (torch.ones(16, 12, 4 * 24),)),
        "scan": (LinearScan(8, 8), (torch.ones(16, 16, 16), torch.ones(16, 16, 16))),
        "blocks": (drawn(BlockLinear((8, 8), (4, 4))), (torch.ones(64, 64, 16),)),
    }[name]
    _, _, parties = privately(module, *inputs)
    # A product with a weight is one message, of the client.
    for party in parties[:1] if name == "blocks" else parties:
        assert looks_random(party.audit)


def test_ranges_are_watched():
    module, z = drawn(LSTM([(2, 2)])), torch.zeros(1, 3, 16, dtype=torch.float64)
    watch = tuned.DOMAINS[LSTM]
    assert not any(span.outside for span in watch(module, z + 20))
    assert any(span.outside for span in watch(module, z + 60))
    assert any("tanh" in (span.outside or "") for span in watch(module, z + 30))
    for value, found in ((20.0, False), (60.0, True)):
        _, _, parties = privately(module, z + value, check=True)
        assert [bool(party.violations) for party in parties] == [found, found]
    growing = torch.full((1, 60, 16), 12.0, dtype=torch.float64)  # c = N when nothing is forgotten
    assert any("tanh" in (span.outside or "") for span in watch(module, growing))


# Costs by formula, as an estimate has them, and as two parties measure them

SIZES = dict(image=8, channels=1, layers=1, width=32, heads=2, memory=16)


def words_of_lstm(steps, units, sequences):
    """One way, by the docstring: whole words of bits are sent, of four gates' numbers and of the tanh's."""
    packed = 7 * (-(-4 * units * sequences // 64) + -(-units * sequences // 64))
    return units * sequences * (9 + 11.5 * (steps - 1)) + steps * packed


def recurrence(model, batch):
    """What the recurrences of one network cost, together."""
    config = model.config
    table = private.estimate(model, (batch, config.channels, config.image, config.image)).operations
    rows = table[table["kind"] == "recurrence"]
    return int(rows["rounds"].sum()), rows["bytes"].sum() / 8


@pytest.mark.parametrize("batch", [1, 3])
def test_costs_are_those_of_the_formulas(batch):
    """16 tokens, two heads, 32 hidden units each way."""
    model = build(preset("cct_2_3x1", attention="multi_lstm", **SIZES))
    assert recurrence(model, batch) == (7 * 16 - 1, words_of_lstm(16, 64, batch))
    model = build(preset("cct_2_3x1", attention="grid_lstm", **SIZES))
    assert recurrence(model, batch) == (2 * (7 * 4 - 1), 2 * words_of_lstm(4, 32, 4 * batch))
    model = build(preset("cct_2_3x1", attention="parallel_scan", **SIZES))
    # Levels of 8 later halves and 8, 4, 2, 1 ends, of which f is opened but at the first.
    words = batch * 64 * sum(8 + ends + ends - 1 for ends in (8, 4, 2, 1))
    assert recurrence(model, batch) == (4, words)


NETWORKS = ("multi_lstm", "lstm", "grid_lstm", "parallel_scan", "mixer")


@pytest.mark.processes
@pytest.mark.parametrize("attention", NETWORKS)
def test_the_estimate_is_what_is_measured(attention):
    torch.manual_seed(0)
    model = build(preset("cct_2_3x1", attention=attention, **SIZES))
    result = private.infer(model, torch.randn(2, 1, 8, 8), "tuned", "TTP")
    estimate = private.estimate(model, (2, 1, 8, 8), provider="TTP")
    columns = ["layer", "kind", "rounds", "bytes", "serial_bytes", "offline_bytes"]
    assert result.operations[columns].equals(estimate.operations[columns])
    assert result.violations == [] and result.error < 5e-3


@pytest.mark.processes
@pytest.mark.parametrize("protocol", ["tuned", "stock"])
def test_a_network_with_an_emptied_layer_runs_as_estimated(protocol):
    torch.manual_seed(0)
    sizes = {**SIZES, "image": 4, "layers": 2}
    config = preset("cct_2_3x1", attention="multi_lstm", **sizes)
    model = shaped(config, [[(0, 0), (0, 0)], [(2, 0), (1, 3)]]).eval()
    result = private.infer(model, torch.randn(1, 1, 4, 4), protocol)
    estimate = private.estimate(model, (1, 1, 4, 4), protocol)
    columns = ["layer", "kind", "rounds", "bytes", "serial_bytes", "offline_bytes"]
    assert result.operations[columns].equals(estimate.operations[columns])
    assert result.error < 0.05, result.error


@pytest.mark.processes
@pytest.mark.parametrize("attention", NETWORKS)
def test_stock_runs_them_as_estimated(attention):
    torch.manual_seed(0)
    model = build(preset("cct_2_3x1", attention=attention, **{**SIZES, "image": 4}))
    result = private.infer(model, torch.randn(1, 1, 4, 4), "stock")
    estimate = private.estimate(model, (1, 1, 4, 4), "stock")
    columns = ["layer", "kind", "rounds", "bytes", "serial_bytes", "offline_bytes"]
    assert result.operations[columns].equals(estimate.operations[columns])
    assert result.error < 0.05, result.error


@pytest.mark.processes
@pytest.mark.parametrize("attention", ["multi_lstm", "grid_lstm", "parallel_scan"])
@pytest.mark.parametrize("image", [16, 32])
def test_networks_of_64_and_256_tokens_are_right(image, attention):
    """Between real parties, weights as wide as trained ones."""
    torch.manual_seed(0)
    config = preset("cct_2_3x1", attention=attention, **{**SIZES, "image": image, "layers": 1 + (image == 16)})
    model = random_like_trained(build(config))
    result = private.infer(model, torch.randn(1, 1, image, image), "tuned", drift=True)
    assert config.tokens == (image // 2) ** 2
    assert result.violations == [] and result.error < 0.01 and result.logits.abs().max() > 0.5
    print(attention, config.tokens, result.error, result.rounds)
    assert (result.drift["error"] <= 0.01 * result.drift["scale"]).all()

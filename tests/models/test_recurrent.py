"""What stands in attention's place: FAR's block against torch.nn.LSTM, scans against a loop, shapes of any size."""

import math

import pytest
import torch
from sizes import mechanism
from torch import nn

from salvit_core import build, cost, preset
from salvit_core.models.attention import recurrent
from salvit_core.models.attention.recurrent import BiLSTM, MultiLSTM
from salvit_core.models.graph import trace
from salvit_core.models.operations import LSTM, BlockLinear, LinearScan

B, M, H = 2, 12, 3
D = M // H
NEW = ("multi_lstm", "lstm", "grid_lstm", "parallel_scan", "mixer")


def tokens(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(module, seed=0):
    """The module in float64, every parameter random: biases are zero when it is made."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return module.double().eval()


def head_of(module, head, sizes):
    """nn.LSTM of one head and one direction each, with the block's weights; a size of zero has none."""
    weight, bias = module.gates.matrices()[head], module.gates.bias.split(module.gates.outputs)[head]
    made, start = [], 0
    for way, size in enumerate(sizes):
        part = slice(4 * start, 4 * (start + size))
        start += size
        if not size:
            made.append(None)
            continue
        lstm = nn.LSTM(weight.shape[1], size, batch_first=True).double()
        lstm.weight_ih_l0.data, lstm.bias_ih_l0.data = weight[part].data, bias[part].data
        lstm.weight_hh_l0.data = module.recurrence.matrices()[2 * head + way].data
        lstm.bias_hh_l0.data = module.recurrence.biases()[2 * head + way].data
        made.append(lstm)
    return made


def separately(module, x):
    """Every head's two LSTMs by torch.nn.LSTM, side by side."""
    parts = []
    for head, (u, sizes) in enumerate(zip(x.split(module.gates.inputs, -1), module.recurrence.hidden, strict=True)):
        forward, backward = head_of(module, head, sizes)
        if forward is not None:
            parts.append(forward(u)[0])
        if backward is not None:
            parts.append(backward(u.flip(1))[0].flip(1))
    return torch.cat(parts, -1)


HIDDEN = {
    "as torch's": [(D, D)] * H,
    "pruned": [(3, 1), (0, 4), (2, 2)],
    "one way": [(5, 0)] * H,
    "a head of none": [(0, 0), (2, 0), (1, 1)],
    "other way": [(0, 1), (0, 3), (0, 0)],
}


@pytest.mark.parametrize("joined", [0, recurrent.JOINED])
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_heads_are_separate_lstms(hidden, count, joined, monkeypatch):
    """A call each, one of all, and step by step, as a graph has it."""
    monkeypatch.setattr(recurrent, "JOINED", joined)
    module, x = drawn(BiLSTM(D, hidden)), tokens(B, count, M)
    with torch.no_grad():
        expected = separately(module, x)
        assert (module(x) - expected).abs().max() < 1e-14
        assert (module.recurrence(module.gates(x)) - expected).abs().max() < 1e-14
    assert expected.std() > 0.05


@pytest.mark.parametrize("hidden", [HIDDEN["as torch's"], HIDDEN["pruned"]])
def test_the_block_is_fars(hidden):
    """Linear, h bidirectional LSTMs, a projection of each head's own, Linear: written with dense, masked matrices."""
    sizes = mechanism("multi_lstm", M, H, 7)
    module, x = drawn(MultiLSTM(Sized(sizes), hidden)), tokens(B, 7, M)
    with torch.no_grad():
        states = separately(module.lstm, module.lower(x))
        dense = torch.block_diag(*module.merge.matrices())  # (M, sum of k)
        expected = module.projection(states @ dense.T + module.merge.bias)
        assert (module(x) - expected).abs().max() < 1e-14


class Sized:
    """The sizes of a mechanism, as a configuration has them."""

    def __init__(self, made):
        self.heads, self.tokens, self.width = made.heads, made.tokens, made.heads * made.head


@pytest.mark.parametrize("joined", [0, recurrent.JOINED])
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_gradients_are_those_of_the_steps(hidden, joined, monkeypatch):
    monkeypatch.setattr(recurrent, "JOINED", joined)
    module, x = drawn(BiLSTM(D, hidden)), tokens(B, 5, M).requires_grad_()
    want = torch.randn(B, 5, sum(module.recurrence.cells)).double()
    found, steps = (
        torch.autograd.grad((want * y).sum(), (x, *module.parameters()))
        for y in (module(x), module.recurrence(module.gates(x)))
    )
    for ours, expected in zip(found, steps, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_gradients_of_the_recurrence(hidden):
    module = drawn(LSTM(hidden))
    z = tokens(1, 2, 3, 4 * sum(module.cells)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, w, b: torch.func.functional_call(module, {"weight": w, "bias": b}, z),
                                    (z, *module.parameters()))  # fmt: skip


def test_blocks_are_those_of_a_block_diagonal_matrix():
    for inputs, outputs in (((3, 3), (2, 2)), ((1, 4, 0), (5, 0, 2))):
        module, x = drawn(BlockLinear(inputs, outputs)), tokens(2, 5, sum(inputs))
        expected = x @ torch.block_diag(*module.matrices()).T + module.bias
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: BlockLinear((1, 2), (3,)), r"blocks of \(1, 2\) inputs and \(3,\) outputs: give as many of both"),
        (lambda: BlockLinear((1,), (-1,)), "none below 0"),
        (lambda: LSTM([]), r"hidden sizes \(\): give two for every head"),
        (lambda: LSTM([(1, -1)]), "none below 0"),
        (lambda: MultiLSTM(Sized(mechanism("self", M, H, 4)), [(1, 1)]), "hidden sizes of 1 heads: the network has 3"),
        (lambda: mechanism("grid_lstm", M, H, 4, hidden=[(1, 1)] * H), "give 3 pairs that add up to 4"),
        (lambda: mechanism("grid_lstm", M, H, 12), "12 tokens are no grid: grid_lstm takes a square"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# A DeiT with FAR's block in place of all attention, 224 px, 1000 classes: what FAR has effectively (other-systems.md).
FAR = {"deit_tiny": 7.521e6, "deit_small": 23.89e6, "deit_base": 83.17e6}


@pytest.mark.parametrize("name", FAR)
def test_parameters_of_deit_with_fars_block(name):
    with torch.device("meta"):
        count = cost.parameters(build(preset(name, attention="multi_lstm")))
    assert float(f"{count:.4g}") == FAR[name]


@pytest.mark.parametrize("name", NEW)
def test_no_biases_of_queries_where_there_are_none(name):
    assert "qkv_bias" in preset("deit_tiny", attention=name).ignored()
    both = preset("deit_tiny", attention=(name, *["self"] * 11))
    assert "qkv_bias" not in both.ignored()


def test_fewer_hidden_units_are_fewer_parameters():
    whole, less = (MultiLSTM(Sized(mechanism("self", M, H, 4)), hidden) for hidden in (None, HIDDEN["pruned"]))
    assert cost.parameters(whole) == 2 * (M * M + M) + H * (2 * (8 * D * D + 8 * D) + 2 * D * D + D)
    gone = sum(2 * D - sum(pair) for pair in HIDDEN["pruned"]) * (4 * D + 4 + 4 + D)  # rows, biases, column of W_p
    squares = sum(4 * (D * D - k * k) for pair in HIDDEN["pruned"] for k in pair)
    assert cost.parameters(whole) - cost.parameters(less) == gone + squares


# Scans


def one_after_another(f, i, forward):
    """h_t = f_t h_(t-1) + i_t by a loop; features from `forward` on from the last token."""
    h = torch.zeros_like(i)
    for part, order in ((slice(forward), range(i.shape[-2])), (slice(forward, None), reversed(range(i.shape[-2])))):
        state = torch.zeros_like(i[..., 0, part])
        for t in order:
            state = f[..., t, part] * state + i[..., t, part]
            h[..., t, part] = state
    return h


@pytest.mark.parametrize("sizes", [(3, 2), (0, 5), (5, 0)])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 17, 64])
def test_the_scan_is_the_loop(count, sizes):
    f, i = tokens(2, 3, count, 5), tokens(2, 3, count, 5, seed=1)
    scan = LinearScan(*sizes)
    torch.testing.assert_close(scan(f, i), one_after_another(f, i, sizes[0]), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(scan, (f[:1, :1, :5].requires_grad_(), i[:1, :1, :5].requires_grad_()))


def test_parallel_scan_is_a_minimal_gru():
    module, x = drawn(mechanism("parallel_scan", M, H, 9)), tokens(B, 9, M)
    with torch.no_grad():
        gates, values = module.gates(x).split(2 * M, -1)
        states = one_after_another(gates.sigmoid(), (1 - gates.sigmoid()) * values, M)
        torch.testing.assert_close(module(x), module.projection(states), rtol=1e-12, atol=1e-12)


# The grid


def on_the_grid(module, x, rows, columns, first):
    """Every row by nn.LSTM, then every column, token by token; `first` class tokens stand before each."""
    u = module.lower(x)
    for way, lstm in enumerate(module.lstm):
        lines = [[r * columns + c for c in range(columns)] for r in range(rows)]
        lines = lines if way == 0 else [list(line) for line in zip(*lines)]
        new, heads = torch.zeros_like(u), []
        for line in lines:
            places = [*range(first), *(first + n for n in line)]
            made = separately(lstm, u[:, places])
            new[:, places[first:]] = made[:, first:]
            heads.append(made[:, :first])
        new[:, :first] = torch.stack(heads).mean(0)
        u = new
    return module.projection(module.merge(u))


@pytest.mark.parametrize(
    "count, rows, columns, first", [(16, 4, 4, 0), (17, 4, 4, 1), (9, 3, 3, 0), (1, 1, 1, 0), (2, 1, 1, 1)]
)
def test_grid_lstm_scans_rows_then_columns(count, rows, columns, first):
    module, x = drawn(mechanism("grid_lstm", M, H, count)), tokens(B, count, M)
    with torch.no_grad():
        torch.testing.assert_close(module(x), on_the_grid(module, x, rows, columns, first), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, count",
    [
        (name, count)
        for name in NEW
        for count in (2, 5, 12, 16, 17, 19)
        if name != "grid_lstm" or count in (2, 5, 16, 17)
    ],
)
def test_every_token_hears_of_every_other(name, count):
    module, x = drawn(mechanism(name, M, H, count)), tokens(1, count, M).requires_grad_()
    for row in module(x)[0].sum(-1):
        (seen,) = torch.autograd.grad(row, x, retain_graph=True)
        assert (seen.abs().sum(-1) > 0).all()


def test_a_mixer_is_an_mlp_over_the_tokens():
    module, x = drawn(mechanism("mixer", M, H, 9, memory=5)), tokens(B, 9, M)
    hidden = nn.functional.gelu(torch.einsum("sn,bnm->bsm", module.expand.weight, x) + module.expand.bias[:, None])
    mixed = torch.einsum("ns,bsm->bnm", module.contract.weight, hidden) + module.contract.bias[:, None]
    torch.testing.assert_close(module(x), mixed @ module.projection.weight.T + module.projection.bias)


# Everything


@pytest.mark.parametrize("name", NEW)
def test_weights_are_the_gradient_of_the_mixed_tokens(name):
    module, x = drawn(mechanism(name, M, H, 5)), tokens(B, 5, M)
    u = module.lower(x).detach()
    jacobian = torch.autograd.functional.jacobian(lambda u: module.mix(u).sum(-1), u)  # (B, N, B, N, M)
    jacobian = torch.stack([jacobian[b, :, b] for b in range(B)]).unflatten(-1, (H if module.apart else 1, -1))
    torch.testing.assert_close(module.weights(x), jacobian.abs().sum(-1).permute(0, 3, 1, 2))
    assert not module.weights(x).requires_grad


@pytest.mark.parametrize("backbone", ["cct_2_3x1", "vit_2", "deit"])
@pytest.mark.parametrize("name", NEW)
def test_networks_train_and_are_traced(name, backbone):
    torch.manual_seed(0)
    size = dict(image=8, patch=2, channels=1, classes=10, layers=2, width=32, heads=2, memory=8)
    config = preset("deit_tiny", attention=name, **size) if backbone == "deit" else preset(backbone, attention=name)
    model, images = build(config), torch.randn(3, 1, 8, 8)
    model(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    graph = trace(model)
    torch.testing.assert_close(graph(images), model(images))
    scans = [node for node in graph.graph.nodes if node.meta["kind"] == "recurrence"]
    expected = {"multi_lstm": 2, "lstm": 2, "grid_lstm": 4, "parallel_scan": 2, "mixer": 0}
    assert len(scans) == expected[name]  # one operation each


def test_bfloat16_trains_in_the_weights_type():
    module = mechanism("multi_lstm", M, H, 9)
    x = torch.randn(B, 9, M)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    out.float().sum().backward()
    assert (out - module(x)).abs().max() < 0.05 and math.isfinite(module.lstm.recurrence.weight.grad.sum())

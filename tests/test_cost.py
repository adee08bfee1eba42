"""FLOPs of the paper's Table 7 and by torch's counter, memory and latency of things whose cost is known."""

import pytest
import torch
from torch import nn

from salvit_core import CCT, cost, preset
from salvit_core.attention import ATTENTION, operations
from salvit_core.graph import _KIND_OF_NAME, trace

# Millions: the paper's convention (facts behind Table 7), and every matmul counted.
FLOPS = {
    "SA softmax": (1904.74, 2363.2),
    "SA 2Quad": (1906.58, 2363.2),
    "EA softmax": (1370.76, 1365.0),
    "SAL-ViT B=3": (1601.32, 1792.8),
    "SAL-ViT B=2": (1524.54, 1650.2),
    "SAL-ViT B=1": (1447.77, 1507.6),
}


@pytest.mark.parametrize("method, expected", FLOPS.items())
def test_flops_of_table_7(method, expected):
    model = CCT(preset("cct_7_3x1", method))
    assert cost.flops(model, "paper") / 1e6 == pytest.approx(expected[0], abs=0.02)
    assert cost.flops(model, "torch") / 1e6 == pytest.approx(expected[1], abs=0.1)


def test_flops_are_per_image_and_leave_the_model_alone():
    model = CCT(preset("cct_2_3x1"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, four = cost.flops(model), cost.flops(model, images=torch.zeros(4, 1, 8, 8))
    assert one == four and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_flops_refusals():
    with pytest.raises(ValueError, match="convention 'mac' is unknown: choose from paper, torch"):
        cost.flops(CCT(preset("cct_2_3x1")), "mac")
    with pytest.raises(ValueError, match="pass images"):
        cost.flops(nn.Linear(2, 2))


class On(nn.Module):
    """One operation on the images themselves, (1, H, N, D), with a second operand of the same or of one column."""

    def __init__(self, operation, second=None):
        super().__init__()
        self.blocks = nn.ModuleList([operation])
        self.second = second

    def forward(self, x):
        y = {"same": x, "column": x[..., :1]}.get(self.second)
        return self.blocks[0](x) if y is None else self.blocks[0](x, y)


H, N, D = 2, 6, 6
COUNTED = {
    "MatMul": (operations.MatMul(), "same", 0, 2 * H * N * N * D),
    "Multiply": (operations.Multiply(), "same", H * N * D, 0),
    "Divide": (operations.Divide(), "column", H * N * D, 0),
    "Exponential": (operations.Exponential(), None, H * N * D, 0),
    "SquaredNorm": (operations.SquaredNorm(), None, 2 * H * N * D, 0),
    "HeadLinear": (operations.HeadLinear(H, N, 3), None, 2 * H * 3 * N * D, 2 * H * 3 * N * D),
    "TokenConv": (operations.TokenConv(H, 5), None, 2 * 5 * H * N * D, 2 * 5 * H * N * D),
    "Gain": (operations.Gain((H, 1, 1)), None, H * N * D, 0),
    "Take": (operations.Take([0, 0, 5]), None, 0, 0),
    "SegmentMeans": (operations.SegmentMeans(N, 3), None, H * N * D, 2 * H * 3 * N * D),
    "NewtonInverse": (operations.NewtonInverse(4), None, 0, 4 * 2 * 2 * H * N**3),
    "Reweight": (operations.Reweight(N), None, 2 * H * N * D, 0),  # N is no square: cosines and sines
    "TokenSum": (operations.TokenSum(), None, H * N * D, 0),
    "PseudoInverse": (operations.PseudoInverse(4), None, 0, 4 * 4 * 2 * H * N**3),
}


@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_flops_of_every_operation(operation):
    module, second, paper, torch_counter = COUNTED[operation.__name__]
    model, x = On(module, second), torch.zeros(1, H, N, D)
    assert (cost.flops(model, "paper", x), cost.flops(model, "torch", x)) == (paper, torch_counter)
    assert cost.flops(model, "paper", x.repeat(3, 1, 1, 1)) == paper  # per image


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_operation_of_every_mechanism_has_a_kind(attention):
    """By the name of its module, not by default: a new mechanism's operations must be placed."""
    config = preset("cct_2_3x1", attention=attention)
    nodes = [node for node in trace(CCT(config)).graph.nodes if node.op == "call_module"]
    inside = [node.target.split(".")[3:] for node in nodes if ".attention." in node.target]
    assert inside
    assert not [names for names in inside if not set(names) & {*_KIND_OF_NAME, "dropout"}]
    table = cost.breakdown(CCT(config), torch.zeros(1, 1, 8, 8), repeats=1)
    assert table["flops"].sum() == cost.flops(CCT(config))
    assert {"projection", "scores", "values"} <= set(table.query("layer == 'block 1'")["kind"])


class Holds(nn.Module):
    """Keeps `kept` tensors of its input's size alive at once, then adds them up one by one."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        return sum([x + i for i in range(self.kept)], torch.zeros(()))


@pytest.mark.parametrize("kept", [1, 4, 9])
def test_peak_memory(kept):
    x = torch.zeros(1000, 250)  # 1 MB
    peak = cost.peak_memory(Holds(kept), x)
    # The kept ones, the running sum and the next.
    assert kept * 1e6 <= peak <= (kept + 2) * 1e6 + 1e4


def test_peak_memory_frees():
    chain = nn.Sequential(*(nn.ReLU() for _ in range(20)))
    assert cost.peak_memory(chain, torch.zeros(1000, 250)) <= 2e6 + 1e4


def test_latency_counts_repeats():
    seconds = cost.latency(CCT(preset("cct_2_3x1")), torch.zeros(1, 1, 8, 8), repeats=4, warmup=1)
    assert len(seconds) == 4 and min(seconds) > 0


def test_breakdown_covers_the_network():
    model = CCT(preset("cct_2_3x1", attention=("self", "external"), normalizer="l2q"))
    table = cost.breakdown(model, torch.zeros(1, 1, 8, 8), repeats=2)
    assert table["flops"].sum() == cost.flops(model)
    assert set(table["layer"]) == {"tokenizer", "block 1", "block 2", "norm", "pool", "head"}
    kinds = {"tokenizer", "LayerNorm", "projection", "scores", "normaliser", "values", "MLP", "activation"}
    assert set(table["kind"]) == kinds | {"pooling", "head"}
    assert (table["seconds"] >= 0).all()

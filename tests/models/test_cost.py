"""FLOPs of the paper's Table 7 and by torch's counter, memory and latency of things whose cost is known."""

import pytest
import torch
from torch import nn

from salvit_core import CCT, cost, preset
from salvit_core.models import operations
from salvit_core.models.attention import ATTENTION
from salvit_core.models.config import PRESETS
from salvit_core.models.graph import trace
from salvit_core.models.operations import KINDS, TORCH, Operation
from salvit_core.models.vit import build

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
    """One operation on the images themselves, (1, H, N, D), with a second operand of the same or of one column.

    Or on four columns of them alone: "gates".
    """

    def __init__(self, operation, second=None):
        super().__init__()
        self.blocks = nn.ModuleList([operation])
        self.second = second

    def forward(self, x):
        x = x[..., :4] if self.second == "gates" else x
        y = {"same": x, "column": x[..., :1]}.get(self.second)
        return self.blocks[0](x) if y is None else self.blocks[0](x, y)


H, N, D = 2, 6, 6
COUNTED = {
    "MatMul": (operations.MatMul(), "same", 0, 2 * H * N * N * D),
    "Multiply": (operations.Multiply(), "same", H * N * D, 0),
    "Divide": (operations.Divide(), "column", H * N * D, 0),
    "ShiftDivide": (operations.ShiftDivide(), "column", H * N * D, 0),
    "Lookup": (operations.Lookup("relu", 8, 0.1), None, H * N * D, 0),
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
    "Sum": (operations.Sum((-2, -1)), None, H * N * D, 0),
    "Resample": (operations.Resample([[0.5, 0.5] * 3], [[1.0] * D]), None, H * N * D, 2 * H * D * (N + 1)),
    "Repeat": (operations.Repeat((1, H, N, D)), None, 0, 0),
    "BlockLinear": (operations.BlockLinear((2, 4), (3, 0)), None, 2 * 6 * H * N, 2 * 6 * H * N),
    "LSTM": (operations.LSTM([(1, 0)]), "gates", 2 * 4 * H * N + 9 * H * N, 2 * 4 * 2 * H * N),
    "LinearScan": (operations.LinearScan(4, 2), "same", 2 * H * N * D, 0),
    "PseudoInverse": (operations.PseudoInverse(4), None, 0, 4 * 4 * 2 * H * N**3),
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_of_an_operation(name):
    module, second, paper, torch_counter = COUNTED[name]
    model, x = On(module, second), torch.zeros(1, H, N, D)
    assert (cost.flops(model, "paper", x), cost.flops(model, "torch", x)) == (paper, torch_counter)
    assert cost.flops(model, "paper", x.repeat(3, 1, 1, 1)) == paper  # per image


def test_every_operation_of_this_file_is_counted_above():
    here = {kind.__name__ for kind in operations.known() if kind.__module__ == operations.__name__}
    assert here == set(COUNTED)


@pytest.mark.parametrize("operation", [kind for kind in operations.known() if kind not in TORCH])
def test_every_operation_says_its_flops(operation):
    assert operation.flops is not Operation.flops, f"{operation.__name__} does not say its FLOPs"


def test_an_operation_without_flops_is_refused():
    class Silent(Operation):
        def forward(self, x):
            return x

    assert Silent in operations.known()
    with pytest.raises(TypeError, match="Silent does not say its FLOPs"):
        cost.flops(nn.Sequential(Silent()), images=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="kind 'norm' is unknown: choose from tokenizer, LayerNorm"):
        operations.of_kind("norm", nn.LayerNorm(2))


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_operation_of_every_mechanism_has_a_kind(attention):
    """Said where it is made, not by default: a new mechanism's operations must be placed."""
    model = CCT(preset("cct_2_3x1", attention=attention))
    nodes = [node for node in trace(model).graph.nodes if node.op == "call_module" and ".attention." in node.target]
    assert nodes
    for node in nodes:
        names = node.target.split(".")
        inner = [model.get_submodule(".".join(names[:length])) for length in range(4, len(names) + 1)]
        assert names[3] == "dropout" or any(getattr(module, "kind", None) for module in inner), node.target
    table = cost.breakdown(model, torch.zeros(1, 1, 8, 8), repeats=1)
    assert table["flops"].sum() == cost.flops(model)
    assert {"projection", "scores", "values"} <= set(table.query("layer == 'block 1'")["kind"])


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_the_tokenizers_is_in_the_tokenizer(name):
    with torch.device("meta"):
        graph = trace(build(preset(name, layers=1)))
    for node in graph.graph.nodes:
        assert node.meta["kind"] in KINDS
        assert (node.meta["kind"] == "tokenizer") == (node.meta["layer"] == "tokenizer") or node.op in (
            "placeholder",
            "output",
        )


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

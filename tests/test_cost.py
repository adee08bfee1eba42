"""FLOPs of the paper's Table 7 and by torch's counter, memory and latency of things whose cost is known."""

import pytest
import torch
from torch import nn

from salvit_core import CCT, cost, preset

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

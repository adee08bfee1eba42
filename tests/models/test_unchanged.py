"""What a change that only moves code keeps: logits in float64, parameters, FLOPs, and the kind of every operation."""

import json
from pathlib import Path

import pytest
import torch

from salvit_core import CCT, build, cost, preset

UNCHANGED = json.loads(Path(__file__).with_name("unchanged.json").read_text())
HEADS = dict(attention=(("self", "external"), ("external", "self")), normalizer="l2q")


def config(name):
    """The network of a line of the fixture: "linformer, l2q", "soft, vit", "activation quad", "l2q head", "heads"."""
    if name == "heads":
        return preset("cct_2_3x1", **HEADS)
    if name.startswith("activation "):
        return preset("cct_2_3x1", activation=name.removeprefix("activation "))
    if name.startswith("l2q "):
        return preset("cct_2_3x1", "SA L2Q", l2q_granularity=name.removeprefix("l2q "))
    attention, normalizer = name.split(", ")
    if normalizer == "vit":
        return preset("vit_2", attention=attention)
    return preset("cct_2_3x1", attention=attention, normalizer=normalizer)


@pytest.mark.parametrize("name", UNCHANGED["logits"])
def test_logits(name):
    """Seeded weights, each moved a little so that none is zero; to the rounding of another processor's sums."""
    torch.manual_seed(0)
    model = build(config(name)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        logits = model(torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64))
    # Performer's features are made orthogonal in float32, whose last bits are the processor's.
    rtol = 1e-5 if name.startswith("performer") else 1e-6
    torch.testing.assert_close(logits.flatten(), torch.tensor(UNCHANGED["logits"][name]).double(), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("row", UNCHANGED["costs"])
def test_costs(row):
    expected = UNCHANGED["costs"][row]
    model = CCT(preset("cct_4_3x1", row))
    assert cost.parameters(model) == expected["parameters"]
    assert cost.flops(model) == expected["paper"] and cost.flops(model, "torch") == expected["torch"]
    table = cost.breakdown(model, torch.zeros(1, 1, 8, 8), 1)
    assert [[line.layer, line.kind, int(line.flops)] for line in table.itertuples()] == expected["kinds"]

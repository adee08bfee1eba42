"""What is read off a trained network: C and D, their spread, the reach of attention, and the loss of a reset."""

import pytest
import torch

from salvit_core import CCT, preset
from salvit_core.experiments import learned


def model(**changes):
    torch.manual_seed(0)
    made = CCT(preset("cct_2_3x1", **{"attention": ("self", "external"), "normalizer": "l2q", **changes})).eval()
    for block in made.blocks:
        for parameter in block.attention.normalizer.parameters():
            torch.nn.init.normal_(parameter, 1.0, 0.5)
    return made


def test_spread_is_of_the_matrices():
    made = model()
    table = learned.spread(made)
    # Layer 1: two heads; layer 2: one matrix that its heads share. C and D each.
    assert len(table) == 2 * (2 + 1)
    row = table.query("layer == 1 and head == 2 and parameter == 'd'").iloc[0]
    values = made.blocks[0].attention.normalizer.d[0, 1]
    assert row["variance"] == pytest.approx(values.var(unbiased=False).item())
    assert (row["low"], row["high"]) == (values.min().item(), values.max().item())


def test_what_is_not_learnt_is_left_out():
    assert set(learned.spread(model(l2q_learn_d=False))["parameter"]) == {"c"}
    assert learned.matrices(model(normalizer="softmax")) == {}


def test_stripes_are_the_part_of_the_variance_that_a_key_or_a_query_explains():
    made = model()
    inside = made.blocks[0].attention.normalizer
    by_key = torch.linspace(0, 1, 16)
    inside.c.data[:] = by_key  # nothing but keys
    inside.d.data[:] = by_key[:, None] + by_key  # as much of both
    table = learned.stripes(made).set_index(["layer", "parameter"])
    assert table.loc[(1, "c")].tolist() == pytest.approx([100, 0], abs=1e-3)
    assert table.loc[(1, "d")].tolist() == pytest.approx([50, 50], abs=1e-3)
    assert (table.loc[2] < 40).all(axis=None)  # 16 tokens of noise


def test_attention_distance_of_known_weights():
    """Attention to oneself reaches 0 tokens; equal attention reaches the mean distance of the grid."""
    made = model(attention="self", heads=2)
    side, tokens = 4, 16
    normalizer = made.blocks[0].attention.normalizer
    normalizer.d.data.zero_()
    normalizer.c.data[0, 0] = torch.eye(tokens)
    normalizer.c.data[0, 1] = 1.0
    table = learned.attention_distance(made, torch.randn(3, 1, 8, 8)).query("layer == 1")
    grid = torch.tensor([(i, j) for i in range(side) for j in range(side)], dtype=torch.float)
    mean = torch.stack([(grid - point).norm(dim=1).mean() for point in grid]).mean().item()
    assert table["distance"].tolist() == pytest.approx([0.0, mean], abs=1e-3)


def test_attention_distance_leaves_out_external_layers():
    assert set(learned.attention_distance(model(), torch.randn(1, 1, 8, 8))["layer"]) == {1}


@pytest.mark.parametrize("granularity, count", [("head", 2), ("layer", 1)])
def test_reset_to_means(granularity, count):
    made = model()
    before = made.blocks[0].attention.normalizer.c.clone()
    after = learned.reset(made, "c", granularity).blocks[0].attention.normalizer
    assert len(after.c.unique()) == count and len(after.d.unique()) > count
    assert after.c.mean().item() == pytest.approx(before.mean().item(), rel=1e-5)
    assert torch.equal(made.blocks[0].attention.normalizer.c, before)  # a copy
    if granularity == "head":
        torch.testing.assert_close(after.c[0, 1, 0, 0], before[0, 1].mean())


@pytest.mark.parametrize("arguments", [("e", "head"), ("c", "element")])
def test_reset_refusals(arguments):
    with pytest.raises(ValueError, match="is unknown: choose"):
        learned.reset(model(), *arguments)

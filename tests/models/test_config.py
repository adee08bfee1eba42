"""Configurations that no network can have, and images that a network is not for."""

import pytest
import torch

from salvit_core import build, preset
from salvit_core.models.graph import trace

NAN = float("nan")


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("width", -32, "1 or more"),
        ("width", "32", "a whole number"),
        ("width", True, "a whole number"),
        ("heads", 0, "1 or more"),
        ("heads", -2, "1 or more"),
        ("stride", 0, "1 or more"),
        ("convolutions", 0, "1 to 64"),
        ("kernel", 0, "1 or more"),
        ("layers", 0, "1 or more"),
        ("layers", 10**9, "at most 1024"),
        ("attention", None, "one name for all layers"),
        ("attention", True, "one name for all layers"),
        ("classes", 0, "1 or more"),
        ("channels", 0, "1 or more"),
        ("image", 0, "1 or more"),
        ("memory", 0, "1 or more"),
        ("mlp_ratio", 0.0, "more than 0.0 to 64.0"),
        ("mlp_ratio", NAN, "a finite number"),
        ("stochastic_depth", 1.0, "0.0 to less than 1.0"),
        ("attention_dropout", -0.1, "0.0 to less than 1.0"),
        ("l2q_initial_c", NAN, "a finite number"),
        ("l2q_initial_d", 1e30, "at most 1000.0"),
        ("l2q_learn_c", "no", "True or False"),
        ("normalizer", ["l2q"], "a name"),
    ],
)
def test_a_field_that_no_network_can_have_is_named(field, value, said):
    with pytest.raises(ValueError, match=f"^{field} is .*: give ({said})") as refused:
        preset("cct_2_3x1", "SA L2Q", **{field: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(attention=(None, "self")), "attention None is unknown: choose from"),
        (dict(attention=[["self", None], "self"]), "must name self or external or scaling for each of 2 heads"),
        (dict(l2q_granularity="x"), "l2q_granularity 'x' is unknown: choose from global, head, element"),
        (dict(mlp_ratio=0.01), "mlp_ratio is 0.01: of width 32 it leaves the MLP nothing"),
        (dict(layers=10**12, attention=1), "layers is 1000000000000: give at most 1024"),
        (dict(layers="2", attention=1), "layers is '2': give a whole number"),
    ],
)
def test_what_does_not_fit_together_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        preset("cct_2_3x1", **changes)
    with pytest.raises(ValueError, match="is unknown: choose from"):
        preset(["cct_2_3x1"])
    with pytest.raises(ValueError, match="is unknown: choose from"):
        preset("cct_2_3x1", ["SA L2Q"])


@pytest.mark.parametrize("shape", [(1, 4, 16), (1, 9, 9), (3, 8, 8), (8, 8)])
@pytest.mark.parametrize("name", ["cct_2_3x1", "vit_2"])
def test_images_of_another_size_are_refused(name, shape):
    """Some leave as many tokens, or are cut to it, and got logits."""
    model = build(preset(name)).eval()
    with pytest.raises(ValueError, match=r"images have shape \(2, .*\): give \(B, 1, 8, 8\)"):
        model(torch.zeros(2, *shape))
    with torch.no_grad():
        assert torch.equal(trace(model)(images := torch.randn(2, 1, 8, 8)), model(images))

"""The model of the Trio-ViT accelerator: the published cycles, its rules counted out, and what it refuses."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from salvit_core import build, cost, preset
from salvit_core.models.operations import HeadLinear, MatMul
from salvit_core.quantization import accelerator
from salvit_core.quantization.accelerator import Accelerator, Work, backbone, by_layer, cycles, read, totals

# Published, millions of cycles at 224, 256 and 288 pixels; and percent of the multipliers that are used.
PUBLISHED = {"efficientvit_b1": (4.005, 5.186, 6.729), "efficientvit_b2": (12.19, 15.82, 20.38)}
USED = {224: 95, 256: 96, 288: 94}


def network(name, **changes):
    with torch.device("meta"):
        return build(preset(name, **changes))


def work(kind="point-wise", inside=8, outside=8, groups=1, height=1, width=1, taps=1):
    return Work("name", "layer", kind, inside, outside, groups, height, width, taps, 1, 1, 1)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("place, image", enumerate((224, 256, 288)))
def test_cycles_are_the_published(name, place, image):
    """Asked for within 2 %; the model is within 0.3 %, and would not be with a rule changed (below)."""
    table = cycles(network(name, image=image))
    found = totals(backbone(table))
    assert found["cycles"] / 1e6 == pytest.approx(PUBLISHED[name][place], rel=0.003)
    if name == "efficientvit_b1":
        assert 100 * found["utilisation"] == pytest.approx(USED[image], abs=2)
    assert totals(table)["cycles"] > found["cycles"]  # the classifier's are counted, and are not in the published


def test_the_earlier_version_is_met_too():
    """16 lanes, no help from the second array: 2.606 million cycles and 77 images per second."""
    machine = Accelerator(lanes=16, joins=False)
    found = totals(backbone(cycles(network("efficientvit_b1"), machine)), machine)
    assert found["cycles"] / 1e6 == pytest.approx(2.606, rel=0.003)
    assert round(found["images_per_second"]) == 77
    assert round(totals(backbone(cycles(network("efficientvit_b1"))))["images_per_second"]) == 50


def test_a_second_array_that_does_not_join_would_miss_the_published():
    machine = Accelerator(joins=False)
    found = totals(backbone(cycles(network("efficientvit_b1"), machine)), machine)
    assert found["cycles"] / 4.005e6 > 1.2


def test_the_layers_are_the_networks():
    """Every multiply-add that torch counts, none twice, and each in its place."""
    for name in ("efficientvit_test", "efficientvit_b0"):
        model = network(name)
        found = read(model)
        assert sum(each.multiply_adds for each in found) == cost.flops(model, "torch") // 2
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | MatMul)]
        assert len(found) == len(convolutions)
        assert sum(each.weights for each in found) == sum(
            module.weight.numel() + (0 if module.bias is None else module.bias.numel())
            for module in convolutions
            if not isinstance(module, MatMul)
        )
        table = cycles(model)
        assert list(dict.fromkeys(table["layer"])) == [
            "tokenizer",
            *(f"block {i + 1}" for i in range(len(model.blocks))),
            "pool",
            "head",
        ]
        assert table["multiply_adds"].sum() == cost.flops(model, "torch") // 2
        assert "depth-wise" not in set(table["kind"])  # all are followed by a point-wise one
        assert (table["utilisation"] > 0).all() and (table["utilisation"] <= 1).all()


def test_transformers_are_read_as_well():
    model = network("cct_4_3x2")
    assert sum(each.multiply_adds for each in read(model)) == cost.flops(model, "torch") // 2
    assert totals(cycles(model))["images_per_second"] > 0


def test_rates_add_up():
    machine = Accelerator(clock=1e6, bits=4)
    table = cycles(network("efficientvit_test"), machine)
    layers = by_layer(table, machine)
    found = totals(table, machine)
    assert layers["cycles"].sum() == table["cycles"].sum() == found["cycles"]
    assert found["milliseconds"] * found["images_per_second"] == pytest.approx(1000)
    assert (layers["speed"] * layers["cycles"] / 1e6).sum() == pytest.approx(table["multiply_adds"].sum())
    first = table.iloc[0]  # the stem: 8x8 images of one channel, 8 x 3 x 3 weights, 8 channels
    assert first["bytes"] == (64 + 72 + 8 * 64) / 2 and first["kind"] == "convolution"
    pair = table[table["kind"] == "fused"].iloc[0]  # what is between them is not moved
    assert pair["bytes"] == (8 * 64 + 72 + 64 + 8 * 64) / 2


SIZES = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_rules_counted_out(inside, outside, groups, lanes, multipliers, height, width):
    """Cycle by cycle, from the mapping: what is in a cycle is what has the same places outside of the arrays."""
    machine = Accelerator(lanes=lanes, multipliers=multipliers)
    pixels = list(itertools.product(range(height), range(width)))
    dense = {
        (tap, i // multipliers, o // (2 * lanes), pixel)
        for tap, i, o, pixel in itertools.product(range(2), range(inside), range(outside), pixels)
    }
    assert machine.dense(work(inside=inside, outside=outside, height=height, width=width, taps=2)) == len(dense)
    deep = {
        (tap, c // lanes, y, x // multipliers) for tap, c, (y, x) in itertools.product(range(3), range(inside), pixels)
    }
    found = machine.depthwise(work("depth-wise", 1, 1, inside, height, width, 3))
    assert found == len(deep)
    places = range(outside * height * width)
    split = {
        (h // 2, i // multipliers, o // lanes) for h, i, o in itertools.product(range(groups), range(inside), places)
    }
    assert machine.attention(work("attention", inside, outside, groups, height, width)) == len(split)
    if groups > 1:
        split = {
            (g // 2, i // multipliers, o // lanes, pixel)
            for g, i, o, pixel in itertools.product(range(groups), range(inside), range(outside), pixels)
        }
        assert machine.dense(work(inside=inside, outside=outside, groups=groups, height=height, width=width)) == len(
            split
        )


def test_fused_layers_share_their_time():
    machine = Accelerator()
    deep = work("depth-wise", 1, 1, groups=64, height=8, width=8, taps=9)  # 9 * 8 * 8 = 576 cycles
    wide = work(inside=64, outside=32, height=8, width=8)  # on one array 8 * 4 * 64 = 2048 cycles, on both half
    assert machine.fused(deep, wide) == 576 + (2048 - 576) // 2
    assert Accelerator(joins=False).fused(deep, wide) == 2048
    narrow = work(inside=64, outside=8, height=8, width=8)  # 512 cycles, while the depth-wise one takes 576
    assert machine.fused(deep, narrow) == Accelerator(joins=False).fused(deep, narrow) == 576


def test_a_depthwise_convolution_that_no_pointwise_one_reads_stands_alone():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 3, padding=1))
    table = cycles(model, image=torch.zeros(1, 8, 8, 8))
    assert list(table["kind"]) == ["depth-wise", "convolution"]
    assert list(table["cycles"]) == [72, 9 * 64]


def test_refusals():
    with pytest.raises(ValueError, match="lanes is 0: give"):
        Accelerator(lanes=0)
    with pytest.raises(ValueError, match="clock is 0.0: give"):
        Accelerator(clock=0.0)
    with pytest.raises(ValueError, match="0 is a HeadLinear, which the arrays do not compute"):
        read(nn.Sequential(HeadLinear(2, 4, 3)), torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match="Linear has no config .*: pass an image"):
        read(nn.Linear(2, 2))
    assert set(accelerator.KINDS) >= set(cycles(network("efficientvit_test"))["kind"])

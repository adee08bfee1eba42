"""What few bits save on shares: tables, and the numbers of notebook 07's conclusions against them."""

import json
from pathlib import Path

import pytest

from salvit_core.experiments import bits_on_shares, profiles, quantization
from salvit_core.quantization.engine import TRICKS

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "07_softmax_free_quantized.ipynb"


@pytest.fixture(scope="module")
def conclusions():
    """The notebook's prose, on one line."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return " ".join(" ".join("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown")


@pytest.fixture(scope="module")
def networks():
    plan = bits_on_shares.trainings(profiles.profile("reference"), "cifar10")
    return plan[bits_on_shares.LINEAR].network, plan[bits_on_shares.SOFTMAX].network


def test_the_conclusions_on_costs_are_the_table_s(conclusions, networks):
    table = bits_on_shares.cost_table(*networks)
    plain, shifted, few, every, grids, softmax = (table.loc[name] for name in table.index)
    said = [
        f"Of {plain['parameters']:,.0f} parameters the EfficientViT takes {plain['rounds']:.0f} rounds and "
        f"{plain['megabytes']:.2f} MB, a CCT with softmax of {softmax['parameters']:,.0f} takes "
        f"{softmax['rounds']:.0f} rounds and {softmax['megabytes']:.2f} MB",
        f"save {shifted['rounds'] - every['rounds']:.0f} of {shifted['rounds']:.0f} rounds and three fifths of the",
        f"{every['dealer_megabytes']:.0f} MB in place of {shifted['dealer_megabytes']:.1f}",
        f"save {shifted['rounds'] - few['rounds']:.0f} of these rounds for {few['dealer_megabytes']:.0f} MB",
        f"more rounds than float, and {grids['dealer_megabytes']:.0f} MB",
        f"it saves {plain['rounds'] - shifted['rounds']:.0f} of {plain['rounds']:.0f} rounds",
    ]
    for line in said:
        assert line in conclusions, line
    assert 0.55 < 1 - every["megabytes"] / shifted["megabytes"] < 0.65
    assert 38 < every["dealer_megabytes"] / shifted["dealer_megabytes"] < 42
    assert grids["rounds"] > plain["rounds"]
    ring = bits_on_shares.small_ring(*networks)
    saved = 1 - ring["megabytes_32"].iloc[0] / ring["megabytes"].iloc[0]
    assert f"would be half as long: {100 * saved:.0f} % of the bytes online" in conclusions
    tables = ring.loc[f"and all functions as tables of {bits_on_shares.TABLES} bits"]
    assert tables["dealer_megabytes"] > 1000 * (tables["megabytes"] - tables["megabytes_32"])
    panels = bits_on_shares.cost_panels(*networks)
    for name, column in (("rounds", "rounds"), ("MB one way", "megabytes")):
        assert panels[name].sum(axis=1).to_dict() == pytest.approx(table[column].to_dict())


def test_the_conclusions_on_gates_are_the_tables(conclusions):
    table = bits_on_shares.functions((8,))
    curve, looked = (table[table["series"] == name].iloc[0] for name in ("a curve", "a table"))
    assert curve["rounds"] - looked["rounds"] == 4 and looked["bytes"] == 1
    assert f"four rounds and {curve['bytes'] - 1:.0f} of {curve['bytes']:.0f} bytes online" in conclusions
    assert f"sends {looked['dealer_bytes']:,.0f} bytes a number where the curve takes {curve['dealer_bytes']:.0f}" in (
        conclusions
    )
    pays = 4 * bits_on_shares.WAN.rtt / 2 / ((looked["wan_us"] - curve["wan_us"]) / 1e6)
    assert f"pay for some {round(pays, -2):,.0f} numbers" in conclusions
    divisions = bits_on_shares.divisors()
    rounds = divisions["rounds"]
    assert f"takes {rounds['log2 divisor']} rounds where a reciprocal takes {rounds['reciprocal']}" in conclusions
    assert f"errs by up to {100 * divisions.loc['log2 divisor', 'error']:.0f} %" in conclusions


def test_the_conclusions_on_the_accelerator_are_the_model_s(conclusions):
    table = bits_on_shares.machine()
    for side, cycles in {224: 4.005, 256: 5.186, 288: 6.729}.items():
        assert abs(table.loc[side, "cycles"] / 1e6 / cycles - 1) < 0.003
    assert f"{table.loc[224, 'images_per_second']:.0f} images a second at 224" in conclusions
    low, high = 100 * table["utilisation"].min(), 100 * table["utilisation"].max()
    assert f"used to {low:.0f} to {high:.0f} %" in conclusions


@pytest.mark.parametrize("name", ["smoke", "quick", "reference"])
def test_runs_of_a_profile(name):
    size = profiles.profile(name)
    data = {"smoke": "digits", "quick": "fashion_mnist", "reference": "cifar10"}[name]
    plan = bits_on_shares.trainings(size, data)
    runs = bits_on_shares.quantizations(size, plan[bits_on_shares.LINEAR])
    assert len(runs) == (2 if name != "reference" else len(quantization.runs(quantization.TRAINED)))
    found = bits_on_shares.evaluations(size, plan, runs)
    assert len(set(found.values())) == 5
    assert found["W4A8"].trained.options.bits_weights == 4 and found["W8A8"].trained.options.bits_activations == 8
    assert all(getattr(found["W8A8"].trained.options, trick) for trick in TRICKS)


def test_products_in_a_smaller_ring_are_the_same_mod_two_to_the_32():
    table = bits_on_shares.products(16, 256, 16, repeats=1)  # it insists on that
    assert (table["milliseconds"] > 0).all() and len(table) == 3

"""What few bits save on shares: tables, and the numbers of notebook 07's conclusions against them."""

import pandas as pd
import pytest
import torch
from prose import page, prose

from salvit_core.experiments import bits_on_shares, execute, profiles, quantization
from salvit_core.models.operations import Lookup
from salvit_core.private.links import LINKS
from salvit_core.quantization.engine import TRICKS

LEFT = "without reconstruction"


@pytest.fixture(scope="module")
def conclusions():
    """The notebook's prose, on one line."""
    return prose("07")


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
        f"save {shifted['rounds'] - every['rounds']:.0f} of the {shifted['rounds']:.0f} rounds that the log2 divisor "
        "leaves and three fifths of the",
        f"{every['dealer_megabytes']:.0f} MB in place of {shifted['dealer_megabytes']:.1f}",
        f"Those of up to {bits_on_shares.FEW} numbers alone save {shifted['rounds'] - few['rounds']:.0f} of these "
        f"rounds for {few['dealer_megabytes']:.1f} MB",
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
    tables = ring.loc[bits_on_shares.ALL_TABLES]
    whole = bits_on_shares.variants(*networks)[bits_on_shares.ALL_TABLES].operations
    assert whole[whole["kind"].isin(["normaliser", "LayerNorm"])]["rounds"].to_list() == [6, 6, 6]
    assert "both normalisers keep 6 rounds and LayerNorm 6, in 64 bits" in conclusions
    assert tables["dealer_megabytes"] > 1000 * (tables["megabytes"] - tables["megabytes_32"])
    panels = bits_on_shares.cost_panels(*networks)
    for name, column in (("rounds", "rounds"), ("MB one way", "megabytes")):
        assert panels[name].sum(axis=1).to_dict() == pytest.approx(table[column].to_dict())
    part = panels["MB one way"].loc[bits_on_shares.SOFTMAX, "normaliser"]
    assert f"Softmax has {part:.2f} MB of these" in conclusions


def test_the_exercise_on_how_many_functions_are_tables(conclusions, networks):
    rows = [bits_on_shares.cost_table(*networks, few=few).iloc[2] for few in (500, bits_on_shares.FEW, 10_000)]
    rows.insert(0, bits_on_shares.cost_table(*networks).loc[bits_on_shares.SHIFTED])
    none, few, usual, many = ((f"{row['rounds']:.0f}", f"{row['dealer_megabytes']:.1f}") for row in rows)
    assert (
        f"Without tables it is {none[0]} rounds and {none[1]} MB of the dealer's. `few=500` gives {few[0]} rounds for "
        f"{few[1]} MB, the {bits_on_shares.FEW} of above {usual[0]} for {usual[1]}, and 10,000 are all functions: "
        f"{many[0]} rounds for {many[1]} MB."
    ) in conclusions
    assert many[1] == f"{bits_on_shares.cost_table(*networks).loc[bits_on_shares.ALL_TABLES, 'dealer_megabytes']:.1f}"
    prices = [
        (more["dealer_megabytes"] - less["dealer_megabytes"]) / (less["rounds"] - more["rounds"])
        for less, more in ((rows[0], rows[1]), (rows[2], rows[3]))
    ]
    last = rows[2]["rounds"] - rows[3]["rounds"]
    said = f"The first rounds cost {prices[0]:.1f} MB each, the last {last:.0f} of them {prices[1]:.1f} MB each:"
    assert said in conclusions


def test_the_conclusions_on_answers_are_the_records(conclusions):
    size = profiles.profile("reference")
    plan = bits_on_shares.trainings(size, "cifar10")
    runs = bits_on_shares.evaluations(size, plan, bits_on_shares.quantizations(size, plan[bits_on_shares.LINEAR]))
    table = bits_on_shares.answers(runs, execute.recorded(runs.values(), "reference"))
    assert len(table) == 6 and (table["images"] == 256).all()
    assert (table.loc[["float", bits_on_shares.SOFTMAX], "agreement"] == 100).all()
    shifted = table[table.index.str.contains("log2")]["agreement"]
    assert (256 * (1 - shifted / 100)).round().tolist() == [1, 1, 1]
    every = table.loc["W8A8, every quantizer"]
    assert (
        f"With every quantizer as a table {every['agreement']:.1f} % are the same answers**, and "
        f"{every['shares']:.1f} % are right in place of {every['clear']:.1f}:"
    ) in conclusions
    seconds = table["seconds"]
    assert (
        f"Eight images in a query take {seconds['float']:.3f} s each in float and "
        f"{seconds[bits_on_shares.SOFTMAX]:.3f} s with the CCT; quantized weights and "
        f"the log2 divisor take {seconds['W8, log2']:.3f} s, every quantizer as a "
        f"table {seconds['W8A8, every quantizer']:.2f} s (two in a query)."
    ) in conclusions


def test_where_tables_win(networks):
    """On every link if they are dealt ahead and on none if not; those of small functions on a WAN either way."""
    names = list(bits_on_shares.variants(*networks))
    for name, link in LINKS.items():
        table = bits_on_shares.waits(*networks, link)
        ahead, both = table["dealt ahead"], table["dealt on the same link"]
        every, small = bits_on_shares.ALL_TABLES, names[2]
        assert ahead[every] < ahead[bits_on_shares.SHIFTED] and both[every] > both[bits_on_shares.SHIFTED]
        assert ahead[small] < ahead[bits_on_shares.SHIFTED]
        assert (both[small] < both[bits_on_shares.SHIFTED]) == name.startswith("WAN")
    found = bits_on_shares.variants(*networks)[bits_on_shares.SOFTMAX]
    assert ahead[bits_on_shares.SOFTMAX] == bits_on_shares.on_links(found, link)["wan_seconds"]


def test_what_notebook_07_shows(conclusions, networks):
    plan = bits_on_shares.trainings(profiles.profile("reference"), "cifar10")
    linear, softmax = (
        execute.ensure(plan[name], "reference")["metrics"]["test_accuracy"]
        for name in (bits_on_shares.LINEAR, bits_on_shares.SOFTMAX)
    )
    costs = bits_on_shares.cost_table(*networks)
    part = costs.iloc[0] / costs.loc[bits_on_shares.SOFTMAX]
    assert round(1 / part["megabytes"]) == 6 and part["rounds"] == pytest.approx(2 / 3, abs=0.01)
    ring = bits_on_shares.small_ring(*networks).iloc[0]
    assert round(ring["megabytes"] / (ring["megabytes"] - ring["megabytes_32"])) == 7
    table = quantization.table(execute.recorded(quantization.runs(), "reference")).set_index(["bits", "variant"])
    lost = table.xs(quantization.ALL, level="variant")["lost"]
    assert lost["W4"] < 0.5
    assert f"but {linear:.1f} % where the CCT has {softmax:.1f} (one seed each, 12 and 6 epochs)" in conclusions
    nearest = table.loc[("W4", "without shift"), "nearest"]
    assert f"Rounded to the nearest, without shift, W4 has {nearest:.1f} %." in conclusions
    assert f"W4 loses nothing measurable, W4A8 {lost['W4A8']:.1f} points, W8A6 {lost['W8A6']:.1f}." in conclusions


def test_what_is_above_float_is_not_said_to_be_below_it():
    rows = [("W8", 51.3, -0.01), ("W4", 51.5, -0.23), ("W8A8", 49.5, 1.78)]
    table = pd.DataFrame(rows, columns=["bits", "accuracy", "lost"]).assign(variant=quantization.ALL)
    said = bits_on_shares.said_of_quantization(table)
    assert "51.3 %, as float." in said and "0.2 points above float" in said and "1.8 points below float" in said


def test_costs_leave_the_user_s_random_numbers_alone(networks):
    bits_on_shares.variants.cache_clear()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    bits_on_shares.variants(*networks)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_conclusions_on_tricks_are_the_records(conclusions):
    table = quantization.table(execute.recorded(quantization.runs(), "reference")).set_index(["bits", "variant"])
    assert len(table) == 23 and (table["seeds"] == 3).all()
    results = page("results.md")
    for bits, words in (("W4", "W4 goes from"), ("W4A8", "W4A8 from")):
        without, whole = table.loc[(bits, LEFT)], table.loc[(bits, quantization.ALL)]
        assert whole["lowest"] > without["highest"]
        for said in (conclusions, results):
            assert f"{words} {without['accuracy']:.1f} to {whole['accuracy']:.1f} %" in said
    rounded, learnt = table["nearest"]["W4"], table["accuracy"]["W4"]
    assert rounded["without shift"] > rounded[quantization.ALL] + 5
    for said in (conclusions, results):
        assert f"without it W4 goes from {rounded['without shift']:.1f} to {learnt['without shift']:.1f}" in said
    for (bits, name), row in table.iterrows():
        whole = table.loc[(bits, quantization.ALL)]
        if (name, bits) not in ((LEFT, "W4"), (LEFT, "W4A8")):  # "the ranges of three overlap"
            assert row["lowest"] <= whole["highest"] and whole["lowest"] <= row["highest"], (bits, name)


def test_the_conclusions_on_gates_are_the_tables(conclusions):
    table = bits_on_shares.functions((9,))
    curve, looked = (table[table["series"] == name].iloc[0] for name in ("a curve", "a table"))
    table_of_bits = Lookup("relu", bits_on_shares.TABLES, 1.0)
    assert looked["bits"] == table_of_bits.bits + table_of_bits.spare  # one more, which clamps
    assert curve["rounds"] - looked["rounds"] == 4
    assert f"four rounds and {curve['bytes'] - looked['bytes']:.0f} of {curve['bytes']:.0f} bytes online" in conclusions
    assert f"sends {looked['dealer_bytes']:,.0f} bytes a number where the curve takes {curve['dealer_bytes']:.0f}" in (
        conclusions
    )
    curve, looked = bits_on_shares.functions((9,), bits_on_shares.FEW).to_dict("records")
    saved = curve["rounds"] - looked["rounds"]
    pays = saved * bits_on_shares.WAN.rtt / 2 / ((looked["wan_us"] - curve["wan_us"]) / 1e6)
    assert saved == 3 and round(pays, -1) == bits_on_shares.FEW
    assert f"a table saves three, which at $K = 9$ pay for some {bits_on_shares.FEW} numbers" in conclusions
    divisions = bits_on_shares.divisors()
    rounds = divisions["rounds"]
    assert f"takes {rounds['log2 divisor']} rounds where a reciprocal takes {rounds['reciprocal']}" in conclusions
    assert f"errs by up to {100 * divisions.loc['log2 divisor', 'error']:.0f} %" in conclusions
    assert f"a reciprocal by {100 * divisions.loc['reciprocal', 'error']:.2f} %" in conclusions


def test_the_conclusions_on_the_accelerator_are_the_model_s(conclusions):
    table = bits_on_shares.machine()
    for side, cycles in {224: 4.005, 256: 5.186, 288: 6.729}.items():
        assert abs(table.loc[side, "cycles"] / 1e6 / cycles - 1) < 0.003
    assert f"{table.loc[224, 'images_per_second']:.0f} images a second at 224" in conclusions
    low, high = 100 * table["utilisation"].min(), 100 * table["utilisation"].max()
    assert f"used to {low:.0f} to {high:.0f} %" in conclusions
    layers = bits_on_shares.machine_layers()
    idle = layers["cycles"] * (1 - layers["utilisation"])
    part = idle[layers["layer"] == "tokenizer"].sum() / idle.sum()
    assert f"what is not used ({100 * part:.0f} %) is in the stem" in conclusions


@pytest.mark.parametrize("name", ["smoke", "quick", "reference"])
def test_runs_of_a_profile(name):
    size = profiles.profile(name)
    data = {"smoke": "digits", "quick": "fashion_mnist", "reference": "cifar10"}[name]
    plan = bits_on_shares.trainings(size, data)
    runs = bits_on_shares.quantizations(size, plan[bits_on_shares.LINEAR])
    assert len(runs) == (2 if name != "reference" else len(quantization.runs(quantization.TRAINED)))
    found = bits_on_shares.evaluations(size, plan, runs)
    assert len(set(found.values())) == 6
    assert [name for name, run in found.items() if run.quantizers] == ["W8A8, every quantizer"]
    assert found["W4, log2"].trained.options.bits_weights == 4
    every = found["W8A8, every quantizer"].trained.options
    assert every.bits_activations == 8 and all(getattr(every, trick) for trick in TRICKS)
    assert found["W8, log2"].trained.options == every


def test_products_in_a_smaller_ring_are_the_same_mod_two_to_the_32():
    table = bits_on_shares.products(16, 256, 16, repeats=1)  # it insists on that of every way
    assert (table["milliseconds"] > 0).all() and len(table) == 3

"""What notebook 00 shows and says: against the records, against CrypTen itself, and where no record is."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from prose import held, prose

from salvit_core import preset, workspace
from salvit_core.experiments import execute, latency, published, store, tour
from salvit_core.experiments.runs import PrivateRun
from salvit_core.private import stock

ROOT = Path(__file__).parents[2]
CELLS = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4).cells
TEXT = prose("00")


@pytest.fixture(scope="module")
def found():
    return tour.answered("reference")


def defined(name, change=lambda source: source):
    """What the cell that defines a function leaves; the cell's own assertions hold as well."""
    (source,) = (cell.source for cell in CELLS if cell.cell_type == "code" and f"def {name}(" in cell.source)
    names = {"np": np, "pd": pd, "rng": np.random.default_rng(0)}
    exec(change(source), names)
    return names


def test_the_network_that_ships_is_right_and_small(found):
    record = store.find(tour.SHIPPED, "reference")
    assert store.path(tour.SHIPPED, "reference", ".pt").stat().st_size < 300_000
    model, data = execute.trained(tour.SHIPPED, "reference"), execute.dataset("digits").test
    with torch.no_grad():
        right = model(data.normalised(data.images)).argmax(1) == data.labels
        clear = model(tour.images())
    accuracy = 100 * right.double().mean().item()
    assert accuracy == pytest.approx(record["metrics"]["test_accuracy"], abs=0.3)
    assert f"{record['metrics']['test_accuracy']:.1f} % of the test images right" in TEXT
    for each in found.values():  # the images that the notebook draws are those of the record
        np.testing.assert_allclose([row["clear"] for row in each["history"]], clear, atol=1e-4)


def test_what_the_notebook_concludes_of_the_answers_is_on_record(found):
    assert [run.protocol for run in found] == ["tuned", "stock"]
    tuned, theirs = (record["metrics"] for record in found.values())
    assert tuned["violations"] == [] and f"logits up to {tuned['largest_error']:.1g}," in TEXT
    assert tuned["agreement"] == 100 and f"the same class for all {tuned['images']} images" in TEXT
    assert theirs["largest_error"] > 1e9 and "logits in the billions" in TEXT
    reciprocals = sum("reciprocals" in each for each in theirs["violations"])
    assert f"{len(theirs['violations'])} operations were asked for what they do not cover, {reciprocals} of" in TEXT
    table = tour.logits(found)
    label = next(iter(found.values()))["history"][0]["label"]
    assert table["in the clear"].idxmax() == table["on shares, tuned"].idxmax() == label
    assert (table["in the clear"] - table["on shares, tuned"]).abs().max() <= tuned["largest_error"]
    for line, metrics in zip(tour.said_of_answers(found).splitlines(), (tuned, theirs), strict=True):
        same = round(metrics["agreement"] * metrics["images"] / 100)
        assert f"Of 8 images {same} get" in line and f"logit is {metrics['largest_error']:.2g}" in line
    assert "outside their domain: 8 operations" in line


def test_what_the_notebook_concludes_of_the_sums_is_on_record(found):
    sums = tour.row_sums(found)
    (low, high), (least, most) = sums["sums in this network"], sums["tuned"]
    assert sums["CrypTen within 1 %"] == stock.RECIPROCAL and least < low < 24 < high < most
    assert f"16 tokens, divides by sums up to {high:.0f};" in TEXT and tour.SHIPPED.network.tokens == 16
    assert f"from {least:.1g} to {float(f'{most:.2g}'):,.0f}." in TEXT
    large = preset("cct_7_3x1", "SAL-ViT B=3")
    violations = store.find(PrivateRun(large, "stock"), "reference")["metrics"]["violations"]
    (wide,) = (each for each in violations if each.startswith("blocks.0.attention.normalizer"))
    first = re.findall(r"row sums (\d+) to (\d+) outside", wide)[0]
    assert f"with 256 tokens, SAL-ViT's first layer divides by {first[0]} to {first[1]}." in TEXT
    assert large.tokens == 256


def test_with_random_weights_both_protocols_are_right():
    for protocol in tour.PROTOCOLS:
        record = store.find(PrivateRun(tour.SHIPPED.network, protocol), "reference")
        assert record["metrics"]["faithful"] and "Here `stock` is right as well (`faithful`)" in TEXT


def test_the_reciprocal_by_hand_is_what_crypten_computes():
    """Where CrypTen's own holds and where it does not, for one process without a peer."""
    stock.crypten.init()
    errors = tour.reciprocal_errors(defined("reciprocal")["reciprocal"])
    x = torch.tensor(errors["x"].to_numpy())
    theirs = (stock.crypten.cryptensor(x).reciprocal().get_plain_text().double() * x - 1).abs().numpy()
    ours, x = errors["error"].to_numpy(), x.numpy()
    assert len(x) == 400 and (x.min(), x.max()) == pytest.approx((0.01, 1e4), rel=1e-3)
    inside, noise = x < 24, x > 256
    assert 250 < x[ours > 2].min() < 256 and "At 255 its start goes wrong" in TEXT
    assert ours[inside].max() < 0.01 and np.abs(ours - theirs)[inside].max() < 0.005
    between = ~inside & (x < 250)
    assert ours[between].max() < 1.5 and theirs[between].max() < 1.5
    assert ours[noise].min() > 1e6 and theirs[noise].min() > 1e6


def test_the_comparison_by_hand_is_right_for_every_number_and_mask():
    negative = defined("negative")["negative"]
    assert all(negative(x) == (x < 0) for x in range(-8, 8) for _ in range(50))


def test_costs_stand_along_axes_that_hold_every_method():
    longest = dict(zip(tour.QUANTITIES, tour.longest(), strict=True))
    spent = [latency.costs(record) for record in published.variants_on_record().values()]  # of all methods
    assert longest["rounds"] == max(each["rounds"] for each in spent)
    assert longest["MB one way"] == pytest.approx(max(each["bytes"] for each in spent) / 1e6)
    for method in ("SA softmax", "EA softmax"):
        tables = tour.costs(method)
        names = list(dict.fromkeys(["SA softmax", method]))
        assert list(tables["rounds"].index) == [f"{name}, {p}" for name in names for p in ("stock", "tuned")]
        for label, most in longest.items():
            assert tables[label].sum(axis=1).max() <= most
    table = pd.DataFrame({name: each.sum(axis=1) for name, each in tour.costs("SAL-ViT B=3").items()})
    told = re.findall(
        r"`stock` needs (\d+) rounds and (\d+) MB each way; SAL-ViT with `tuned`, (\d+) and (\d+)\.", TEXT
    )
    rows = [table.loc["SA softmax, stock"], table.loc["SAL-ViT B=3, tuned"]]
    assert told == [tuple(str(round(row[name])) for row in rows for name in ("rounds", "MB one way"))]


def test_the_exercise_has_a_solution_that_holds():
    weights = tour.normalizer_weights(-2, 1)
    for name, rows in weights.groupby("normalizer"):
        assert rows["weight"].sum() == pytest.approx(1, abs=1e-4)
        assert rows.nlargest(1, "weight")["score"].item() == (-6 if name == "L2Q" else 6), name
    other = tour.normalizer_weights(2, -1)
    np.testing.assert_allclose(weights["weight"], other["weight"], atol=1e-6)


def test_a_networks_record_and_weights_come_with_it(tmp_path, monkeypatch):
    """So that nothing is trained; what is there already stays."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "reference").symlink_to(ROOT / "data" / "reference")
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    monkeypatch.setitem(execute._MEASURES, type(tour.SHIPPED), lambda *_: pytest.fail("it was trained"))
    execute.carry_over(tour.SHIPPED)
    assert store.find(tour.SHIPPED) == store.find(tour.SHIPPED, "reference")
    before = execute.trained(tour.SHIPPED).state_dict()
    path = store.path(tour.SHIPPED, ending=".pt")
    assert path.read_bytes() == store.path(tour.SHIPPED, "reference", ".pt").read_bytes()
    assert len(before) > 20
    path.write_bytes(b"another's")
    execute.carry_over(tour.SHIPPED)
    assert path.read_bytes() == b"another's"


def test_a_network_without_weights_on_record_is_not_carried_over(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    execute.carry_over(tour.SHIPPED)
    assert store.find(tour.SHIPPED) is None and not list(tmp_path.rglob("*.pt"))


# The exercises of the class


def solution(heading):
    """The code of an exercise's solution on the page for a class, below the cell that it goes on from."""
    page = (ROOT / "docs" / "class.md").read_text()
    (found,) = re.findall(rf"### {heading}\n.*?```python\n(.*?)```", page, re.S)
    return found


def test_a_mask_that_is_used_twice_tells_a_difference():
    names = defined("split")
    exec(solution("The same mask twice"), names)
    assert names["told"] == 24 - 40


def test_more_bits_move_one_end_of_the_reciprocal_and_not_the_other(capsys):
    ends = {}
    for bits in (16, 20):
        names = defined("reciprocal", lambda source, bits=bits: source.replace("16", str(bits)))
        exec("from salvit_core.experiments import tour", names)
        exec(solution("More bits").replace("bits=20", f"bits={bits}"), names)
        ends[bits] = [round(float(each)) for each in capsys.readouterr().out.split()]
    (first, noise), (moved, same) = ends[16], ends[20]
    assert noise == same
    held("class.md", f"from {first} to {moved}", f"noise begins at {noise}")

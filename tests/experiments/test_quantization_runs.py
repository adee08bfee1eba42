"""Runs of quantization: what they share, their records, the table, and what is published beside it."""

import dataclasses
import json

import pytest

from salvit_core import figures, preset, workspace
from salvit_core.experiments import execute, quantization, store
from salvit_core.experiments.runs import QuantizationRun, TrainRun, run_of
from salvit_core.quantization import Quantization
from salvit_core.training import Recipe

TRAINED = TrainRun("digits", preset("efficientvit_test"), Recipe(epochs=4, batch=64, lr=4e-3, augment="none"))
BRIEF = dict(images=32, iterations=5, lr=2e-2, iterations_activations=3, lr_activations=1e-3)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One seed, two choices of bits: everything that the table holds."""
    before, workspace.ROOT = workspace.ROOT, tmp_path_factory.mktemp("workspace")
    try:
        yield execute.collect(quantization.runs(TRAINED, (0,), ((4, None), (4, 8)), **BRIEF))
    finally:
        workspace.ROOT = before


def test_each_trick_is_left_out_where_it_has_a_part():
    runs = quantization.runs()
    assert len(runs) == len(set(runs)) == len({store.key(run) for run in runs}) == 3 * (2 * 4 + 3 * 5)
    labels = [run.label() for run in runs]
    assert labels[0] == "cifar10 efficientvit 8-16-32-64 32px w8 calibration 1005"
    assert "cifar10 efficientvit 8-16-32-64 32px w4a8 no log2 calibration 1007" in labels
    assert not any(" w4 no log2" in label for label in labels)  # the divisor is of activations


def test_a_key_holds_what_counts_alone():
    run = QuantizationRun(TRAINED, Quantization(bits_weights=4, activations=False))
    other = dataclasses.replace(run, options=Quantization(4, 6, activations=False, log2=False))
    assert store.key(run) == store.key(other) == store.key(other.weights_alone())
    assert store.key(run) != store.key(QuantizationRun(TRAINED, Quantization(4)))
    assert store.canonical(run)["options"] == {"type": "Quantization", "bits_weights": 4, "activations": False}


def test_records_say_every_stage_and_are_found_again(found):
    assert len(found) == 4 + 5 and not found.absent
    for run, record in found.items():
        assert run_of(json.loads(json.dumps(record))) == run
        stages = {"float", "nearest", "weights"} | ({"activations"} if run.options.activations else set())
        assert stages == set(record["metrics"]["accuracy"]) and record["metrics"]["accuracy"]["float"] > 60
        learnt = [each for each in record["history"] if "undecided" in each]
        assert len(learnt) == (8 if run.options.reconstruction else 0)
    # What differs in activations alone has the same weights, learnt once.
    for run in [run for run in found if run.options.activations]:
        alone = execute.ensure(run.weights_alone())["metrics"]["accuracy"]
        assert alone.items() <= found[run]["metrics"]["accuracy"].items()
    assert len(list((store.folder() / "quantization").glob("*.phases"))) == 3  # all, without migration, without shift
    assert not list((store.folder() / "quantization").glob("*.unfinished"))


def test_other_weights_are_refused(found):
    run = next(iter(found))
    trained = store.path(TRAINED)
    record = json.loads(trained.read_text())
    record["metrics"]["weights"] = "0123456789ab"
    whole = trained.read_text()
    trained.write_text(json.dumps(record))
    try:
        with pytest.raises(ValueError, match="is of other weights than"):
            execute.ensure(run)
    finally:
        trained.write_text(whole)


def test_the_table_and_its_figure(found):
    table = quantization.table(found)
    assert list(table["bits"].astype(str).unique()) == ["W4", "W4A8"] and len(table) == 9
    assert (table["seeds"] == 1).all() and table["spread"].isna().all()
    for _, row in table.iterrows():
        assert row["lowest"] == row["accuracy"] == row["highest"]
    row = table[(table["bits"] == "W4A8") & (table["variant"] == "without shift")].iloc[0]
    (run,) = (run for run in found if run.options.activations and not run.options.shift)
    assert row["accuracy"] == found[run]["metrics"]["accuracy"]["activations"]
    assert row["lost"] == pytest.approx(found[run]["metrics"]["accuracy"]["float"] - row["accuracy"])
    twice = quantization.table(
        dict(found)
        | {dataclasses.replace(run, options=dataclasses.replace(run.options, seed=1)): r for run, r in found.items()}
    )
    assert (twice["seeds"] == 2).all() and (twice["spread"] == 0).all()
    figure = figures.accuracy_by_bits(table, reference=found[run]["metrics"]["accuracy"]["float"], note="of digits")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*quantization.VARIANTS, "float"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["W4", "W4A8"]


def test_what_is_published_is_said_to_be():
    logs = quantization.logs()
    assert (logs["source"] == "published, ImageNet, most likely B1").all() and len(logs) == 14
    shifted = logs[(logs["bits"] == "W8A8") & (logs["variant"] == "filter-wise shift")].iloc[0]
    assert shifted["accuracy"] == 79.19 and shifted["lost"] == 0.21

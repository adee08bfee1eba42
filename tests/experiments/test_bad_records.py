"""Records and weights beside them: named when they are damaged, refused when they are of something else."""

import dataclasses
import json
import os

import pytest
import torch

from salvit_core import cli, preset, workspace
from salvit_core.experiments import execute, profiles, store
from salvit_core.experiments.migrate import migrate
from salvit_core.experiments.runs import EvaluationRun, LearnedRun, TrainRun, run_of
from salvit_core.training import Recipe

RUN = TrainRun("digits", preset("cct_2_3x1", "SA L2Q"), Recipe(epochs=1, batch=64, augment="none"), images=128)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A record and its weights, trained once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workspace, "ROOT", tmp_path_factory.mktemp("trained"))
        execute.dataset.cache_clear()
        execute.ensure(RUN)
        return [(path.name, path.read_bytes()) for path in (store.path(RUN), store.path(RUN, ending=".pt"))]


@pytest.fixture(autouse=True)
def beside(tmp_path, monkeypatch, trained):
    """The record's path in a workspace of its own; its weights are beside it."""
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    execute.dataset.cache_clear()
    folder = store.path(RUN).parent
    folder.mkdir(parents=True)
    for name, content in trained:
        (folder / name).write_bytes(content)
    yield store.path(RUN)
    execute.dataset.cache_clear()


def test_a_lost_run_is_named(tmp_path):
    wild = dataclasses.replace(RUN, recipe=Recipe(epochs=1, batch=128, augment="none", lr=1e30))
    with pytest.raises(FloatingPointError, match="^digits cct_2_3x1 SA L2Q 1 epochs seed 0: .* epoch 0") as lost:
        execute.ensure(wild)
    assert "\n" not in str(lost.value) and not store.path(wild).exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1]", b"null", b"{}", b'{"metrics": NaN}', b"[" * 100_000])
@pytest.mark.parametrize("read", [lambda: store.find(RUN), lambda: store.load("training"), lambda: execute.ensure(RUN)])
def test_what_is_no_record_is_named(beside, content, read):
    beside.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{beside.name} is not (JSON|a record).*: delete it to run it again"
    ) as refused:
        read()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["config", "metrics"])
def test_a_record_with_a_part_of_another_kind_is_none(beside, part):
    beside.write_text(json.dumps({**json.loads(beside.read_text()), part: [1]}))
    with pytest.raises(ValueError, match=f"{beside.name} is not a record: delete it"):
        store.find(RUN)


def test_a_record_that_cannot_be_read_is_not_to_be_deleted(beside, monkeypatch):
    beside.unlink()
    os.mkfifo(beside)
    with pytest.raises(OSError, match=f"cannot read .*{beside.name} .*no plain file") as refused:
        store.find(RUN)
    assert "delete" not in str(refused.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda config: config["recipe"].update(lr=5.0), "its config.recipe.lr is 5.0, asked was 0.0006"),
        (lambda config: config.update(images=0), "its config.images is 0, asked was 128"),
        (
            lambda config: config["network"].update(attention=["self", "external"]),
            r"its config.network.attention\[1\] is",
        ),
        (lambda config: config["network"].pop("layers"), "its config.network.layers is None, asked was 2"),
        (lambda config: config.update(recipe=None), "its config.recipe is None"),
    ],
)
def test_another_config_under_the_same_key_is_refused(beside, change, said):
    record = json.loads(beside.read_text())
    change(record["config"])
    beside.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{beside.name} is of another run: {said}.*; delete it to run it again"):
        store.find(RUN)


def test_a_field_that_came_later_or_is_ignored_does_not_matter(beside):
    record = json.loads(beside.read_text())
    del record["config"]["recipe"]["compile"]
    record["config"]["recipe"]["temperature"] = 9.0  # nothing is distilled
    beside.write_text(json.dumps(record))
    assert store.find(RUN) == record


def test_a_place_that_takes_no_record_is_refused_before_it_is_measured(beside):
    other = dataclasses.replace(RUN, images=64)
    store.path(other).symlink_to("elsewhere.json")
    with pytest.raises(OSError, match="cannot read .*No such file"):
        store.ensure(other, lambda run: pytest.fail("measured"))
    beside.unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workspace, "try_out", lambda path: (_ for _ in ()).throw(OSError("cannot write")))
        with pytest.raises(OSError, match="cannot write"):
            store.ensure(RUN, lambda run: pytest.fail("measured"))


# Weights


@pytest.mark.parametrize("size, said", [(500, "is not a file of weights"), (0, "is not a file of weights")])
def test_truncated_weights_are_named(beside, size, said):
    weights = beside.with_suffix(".pt")
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{weights.name} {said} .*: delete it"):
        execute.trained(RUN)


def test_weights_of_another_training_are_refused(beside):
    weights = beside.with_suffix(".pt")
    other = torch.load(weights, weights_only=True)
    other["head.bias"] += 1
    torch.save(other, weights)
    with pytest.raises(ValueError, match=f"{weights.name} are not those of its record: delete .*{beside.name}"):
        execute.trained(RUN)
    torch.save({"head.bias": torch.zeros(10)}, weights)
    with pytest.raises(ValueError, match=f"{weights.name} are of another network"):
        execute.trained(RUN)


def test_without_weights_the_way_out_works(beside):
    weights = beside.with_suffix(".pt")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=f"no weights .* for this record: delete .*{beside.name} to train it"):
        execute.trained(RUN)
    beside.unlink()
    assert execute.trained(RUN).config == RUN.network and weights.exists()


def test_what_was_measured_of_other_weights_is_refused(beside):
    run = LearnedRun(RUN)
    measured = {"weights": json.loads(beside.read_text())["metrics"]["weights"]}
    store.ensure(run, lambda run: measured)
    assert execute.ensure(run)["metrics"] == measured
    record = json.loads(beside.read_text())
    record["metrics"]["weights"] = "0" * 12
    beside.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="record .*learned.* is of other weights than .*training.*: delete it to run"):
        execute.ensure(run)


# What is read back, moved, or made


def test_a_config_that_no_run_has_is_named(beside, tmp_path):
    record = json.loads(beside.read_text())
    record["config"]["recipe"]["lr"] = -5.0
    with pytest.raises(ValueError, match=f"the config of record {record['key']} is of no TrainRun: lr is -5.0: give"):
        run_of(record)
    for content, said in ((json.dumps(record), "is no record that can be moved"), ("{", "is not JSON")):
        beside.write_text(content)
        with pytest.raises(ValueError, match=f"{beside.name} {said} .*: mend it or delete it"):
            migrate(tmp_path / "data" / "runs")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(queries=0), "queries is 0: give 1 or more"),
        (dict(images=-1), "images is -1: give 0 or more"),
        (dict(search_epochs=1.5), "search_epochs is 1.5: give a whole number"),
        (dict(methods=("SA cubic",)), r"methods \('SA cubic',\) is unknown: choose from SA softmax"),
        (dict(trained="cct_99"), "trained 'cct_99' is unknown"),
        (dict(recipe=None), "recipe is None: give a Recipe"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(profiles.profile("smoke"), **changes)
    with pytest.raises(ValueError, match=r"profile \['smoke'\] is unknown"):
        profiles.profile(["smoke"])


@pytest.mark.parametrize(
    "kind, changes, said",
    [
        (TrainRun, dict(data="digits", network=RUN.network, recipe=RUN.recipe, images=-1), "images is -1: give 0"),
        (TrainRun, dict(data="digits", network=None, recipe=RUN.recipe), "network is None: give a TransformerConfig"),
        (EvaluationRun, dict(trained=RUN, n=1.5), "n is 1.5: give a whole number"),
        (EvaluationRun, dict(trained=RUN, batch=0), "batch is 0: give 1 or more"),
        (LearnedRun, dict(trained=RUN, images=0), "images is 0: give 1 or more"),
    ],
)
def test_a_run_that_cannot_be_is_refused(kind, changes, said):
    with pytest.raises(ValueError, match=said):
        kind(**changes)


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("result.json", b"\xff", "result.json is no result of salvit train or search"),
        ("result.json", b"[1]", "result.json is no result of salvit train or search"),
        ("result.json", b'{"config": {"width": 0}}', "width is 0: give 1 or more"),
        ("weights.pt", b"\x80", "weights.pt is not a file of weights"),
    ],
)
def test_a_folder_that_holds_no_run_is_refused_by_the_command(tmp_path, beside, file, content, said):
    config = json.loads(beside.read_text())["config"]["network"]
    (tmp_path / "result.json").write_text(json.dumps({"config": config, "data": "digits"}))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        cli.main(["infer", "--run", str(tmp_path)])
    assert said in str(ended.value.code) and "\n" not in str(ended.value.code)

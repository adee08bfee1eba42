"""The campaign: the order of worth, an end that is told in minutes, and going on after it."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch

from salvit_core import preset, workspace
from salvit_core.experiments import evidence, execute, store
from salvit_core.experiments.runs import TrainRun
from salvit_core.training import Recipe

NAMES = ("SAS-L", "SAS-L-WC")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    execute.dataset.cache_clear()
    yield tmp_path
    execute.dataset.cache_clear()


def test_minutes_of_a_gpu_go_to_the_main_rows_first():
    wanted = evidence.campaign("short")
    assert [each.label().replace(" seed 0", "") for each in wanted[:10]] == [
        "cifar10 sas-l l2q b 3 top 5 and 12 epochs",
        "cifar10 cct_7_3x1 SA softmax 12 epochs",
        "cifar10 cct_7_3x1 SA L2Q 12 epochs",
        "cifar10 cct_7_3x1 EA L2Q 12 epochs",
        "cifar10 cct_7_3x1 SA 2Quad 12 epochs",
        "cifar10 cct_7_3x1 EA softmax 12 epochs",
        "cifar100 cct 7x256 32px self softmax 12 epochs",
        "cifar100 sas-l l2q b 3 top 5 and 12 epochs",
        "cifar100 cct 7x256 32px self l2q 12 epochs",
        "cifar100 cct 7x256 32px external l2q 12 epochs",
    ]
    assert len(set(wanted)) == len(wanted) and {run for _, run in evidence.named(evidence.profile("short"))} < set(
        wanted
    )


def run(**changes):
    recipe = Recipe(epochs=1, batch=64, lr=2e-3, augment="none")
    return TrainRun("digits", preset("cct_2_3x1", "SA L2Q"), dataclasses.replace(recipe, **changes), images=128)


@pytest.mark.processes
def test_it_ends_when_it_is_told_and_goes_on_next_time(root, monkeypatch, capsys):
    """What is finished is on record with its weights, what is not has a checkpoint, and its epochs are not lost."""
    brief, endless = run(), run(epochs=100_000)
    monkeypatch.setattr(evidence, "campaign", lambda name: [endless, brief])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(execute, "MOST_TOGETHER", 2)
    checkpoint = store.path(endless, ending=".unfinished") / "checkpoint.pt"

    def epochs():
        return len(torch.load(checkpoint, weights_only=True)["history"]) if checkpoint.exists() else 0

    def over(running, patience, until):  # the time: once the brief one is done and the other further than before
        assert patience <= 60
        done, _ = wait(running, 0.5, until)
        while not done and not (store.find(brief) and epochs() > known[-1]):
            done, _ = wait(running, 0.5, until)
        return done, set(running) - done

    known, wait = [0], execute.wait
    monkeypatch.setattr(execute, "wait", over)
    for _ in range(2):
        assert evidence.run(evidence.Evidence(minutes=1)) == 0
        known.append(epochs())
    assert 0 < known[1] < known[2]
    assert "2 runs: 1 done here, 0 in data/reference, 1 left" in capsys.readouterr().out
    assert store.find(brief) and store.path(brief, ending=".pt").exists() and not store.find(endless)


@pytest.mark.processes
def test_one_that_fails_does_not_end_the_others(monkeypatch):
    broken, sound = run(lr=1e30, epochs=3), run()
    monkeypatch.setattr(evidence, "campaign", lambda name: [broken, sound])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(execute, "MOST_TOGETHER", 1)
    with pytest.raises(FloatingPointError, match="epoch"):
        evidence.run(evidence.Evidence(minutes=10))
    assert store.find(sound) and not store.find(broken)


@pytest.mark.processes
def test_without_a_minute_nothing_is_done(root, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "campaign", lambda name: [run(), run(seed=1)])
    assert evidence.run(evidence.Evidence(minutes=0.0)) == 0
    assert evidence.run(evidence.Evidence(minutes=0.0, most=1)) == 0
    assert capsys.readouterr().out.count("0 done, 2 left") == 2 and not list(root.rglob("*.json"))


def test_what_a_search_picks_is_held_against_every_assignment(monkeypatch):
    """From the project's own records; ranks found again by hand."""
    monkeypatch.setattr(workspace, "ROOT", Path(__file__).parents[2])
    truth = evidence.truth_table()
    assert len(truth) == 16 and set(truth.index[truth["B"] == 1]) == {"SEEE", "ESEE", "EESE", "EEES"}
    chosen = evidence.picks(truth).loc[("SAS-L B=2", 0)]
    rivals = truth.loc[truth["B"] == 2, "mean"]
    assert chosen["of"] == 6 and chosen["rank"] == 1 + (rivals > truth.loc[chosen["chosen"], "mean"]).sum()
    assert chosen["regret"] == pytest.approx(rivals.max() - rivals[chosen["chosen"]])
    assert chosen["worst"] == pytest.approx(rivals.max() - rivals.min())
    # The prose of docs/results.md: with L2Q the highest alphas are each budget's worst choice, the lowest good ones.
    top, bottom = (evidence.picks(truth).xs(0, level="seed").filter(regex=rf"^{name} B=\d$", axis=0) for name in NAMES)
    assert (top["rank"] == top["of"]).all() and list(bottom["regret"].round(1)) == [0.6, 0.0, 0.0]
    assert (top["tau"] < 0).all()
    assert (top["mixture"] - top["extracted"] > 6).all() and (bottom["mixture"] - bottom["extracted"] < 2).all()


def test_searches_are_judged_by_each_score_at_every_budget(monkeypatch):
    """On the truth's images; a score that is the truth itself has no regret, its opposite the largest."""
    truth = pd.DataFrame(
        {"B": [0, 1, 1, 2], "mean": [50.0, 51.0, 53.0, 54.0], "rank": [1, 2, 1, 1]}, ["EE", "SE", "ES", "SS"]
    )
    size = evidence.profile("smoke")
    size = dataclasses.replace(size, changes={"layers": 2})
    monkeypatch.setattr(evidence, "profile", lambda name: size)
    runs = evidence.searches(size, "digits", seeds=2)
    assert len(runs) == 14 and len({store.key(run) for run in runs.values()}) == 14
    assert {run.images for run in runs.values()} == {evidence.TRUTH["images"]}
    assert runs["alpha by SGD", 1].search.first.sgd == ("alpha",) and not runs["alpha by SGD", 1].search.finetune.sgd
    known = {"alphas": [0.2, 0.1], "scores": {"saliency": [0.1, 0.2], "perturbation": [-0.3, -0.1]}}
    for seed in range(2):
        file = store.path(runs["released", seed], "reference")
        workspace.write_json(file, record_of(runs["released", seed], known))
    found = evidence.judged(truth, "smoke", "digits")
    assert len(found) == 2 * 3 and set(found["search"]) == {"released"} and set(found["B"]) == {1}
    by = found[found["seed"] == 0].set_index("score")
    assert list(by["chosen"]) == ["SE", "ES", "ES"] and list(by["regret"]) == [2.0, 0.0, 0.0]
    assert (by["random"] == 1.0).all() and (by["worst"] == 2.0).all()
    assert by["tau"].to_dict() == pytest.approx({"alpha": 2 / 3, "saliency": 1.0, "perturbation": -2 / 3})
    told = evidence.verdicts(found)
    assert (told["n"] == 2).all() and (told["spread"] == 0).all()
    assert told.loc[("released", "alpha"), "B = 1"] == told.loc[("released", "alpha"), "regret"] == 2.0
    drawn = evidence.regrets(told)
    assert drawn.loc["released"].to_dict() == {
        "by alpha": 2.0,
        "by saliency": 0.0,
        "by perturbation": told.loc[("released", "perturbation"), "regret"],
        "a random choice": 1.0,
        "the worst": 2.0,
    }
    assert evidence.verdicts(evidence.judged(truth.iloc[:0], "smoke", "digits").iloc[:0]).empty


def test_extractions_are_means_over_seeds_by_normaliser_and_way(monkeypatch):
    """They share the first phase of Algorithm 1's search on the same images."""
    size = evidence.profile("smoke")
    monkeypatch.setattr(evidence, "profile", lambda name: size)
    runs = evidence.extractions(size, "digits", seeds=2)
    assert len({store.key(run) for run in runs.values()}) == 16
    first = {run.first_phase() for run in runs.values() if not isinstance(run, TrainRun)}
    assert len(first) == 4 and evidence.searches(size, "digits")["Eq. 5, lambda 0.1", 1].first_phase() in first
    for seed, alphas in ((0, [0.1, -0.4]), (1, [0.3, 0.2])):
        nas = [{"validation_accuracy": 40.0}, {"validation_accuracy": 60.0 + seed}]
        record = record_of(run := runs["2ReLU", "B = 2", seed], dict(test_accuracy=70.0 + seed, alphas=alphas, nas=nas))
        record["history"] = [{"validation_accuracy": each} for each in (30.0, 50.0, 65.0)]
        workspace.write_json(store.path(run, "reference"), record)
    record = record_of(run := runs["L2Q", "B = 2, from scratch", 0], dict(test_accuracy=66.0))
    record["history"] = [{"validation_accuracy": each} for each in (20.0, 64.0)]
    workspace.write_json(store.path(run, "reference"), record)
    table = evidence.extracted("smoke", "digits")
    assert len(table) == 2
    row = table.loc[("2ReLU", "B = 2")]
    assert (row["n"], row["mixture"], row["first epoch"], row["last epoch"]) == (2, 60.5, 30.0, 65.0)
    assert (row["test"], row["low"], row["high"]) == (70.5, 70.0, 71.0)
    assert (row["largest alpha"], row["second alpha"]) == pytest.approx((0.35, 0.15))
    assert pd.isna(table.loc[("L2Q", "B = 2, from scratch"), ["mixture", "largest alpha"]]).all()


def record_of(run, metrics):
    return {"study": run.study, "key": store.key(run), "config": dataclasses.asdict(run), "metrics": metrics}


def test_publishing_adds_records_of_committed_code_and_replaces_none(root, capsys):
    first, second, third = evidence.campaign("smoke")[:3]
    for each, commit in ((first, "abc"), (second, "abc"), (third, "abc+")):
        workspace.write_json(store.path(each), {**record_of(each, {}), "commit": commit})
    workspace.write_json(store.path(first, "reference"), {**record_of(first, {}), "commit": "older"})
    evidence.run(evidence.Evidence(profile="smoke", publish=True))
    assert store.find(first, "reference")["commit"] == "older" and store.find(second, "reference")["commit"] == "abc"
    assert store.find(third, "reference") is None and "was not committed (abc+)" in capsys.readouterr().out

"""Trainings on a Ray cluster of two nodes on this machine: a node that dies, a driver that dies, a run that fails."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time

import nbformat
import psutil
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from salvit_core import preset, workspace
from salvit_core.experiments import evidence, execute, store
from salvit_core.experiments.runs import ReplacementRun, SearchRun, TrainRun
from salvit_core.replacement.distillation import Distillation
from salvit_core.replacement.pruning import Pruning
from salvit_core.search import sas
from salvit_core.training import Recipe

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'salvit-core[ray]'")
cluster = pytest.importorskip("salvit_core.experiments.cluster")

RECIPE = Recipe(epochs=12, batch=64, lr=2e-3, augment="none")
# A dead node, which answers with a refusal, is missed after two seconds; a busy one has as long as ever to answer.
IMPATIENT = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    monkeypatch.setattr(cluster, "EVERY", 0.1)
    execute.dataset.cache_clear()
    yield tmp_path
    execute.dataset.cache_clear()


def started(start):
    """A raylet gives its agents, two Python processes, 15 seconds to start, which a busy machine exceeds, and dies."""
    for _ in range(3):
        with contextlib.suppress(Exception):  # which has no class of its own
            return start()
    return start()


@pytest.fixture(scope="module")
def nodes():
    """Two nodes, with one thread for each training; the second may die."""
    from ray.cluster_utils import Cluster

    size = dict(num_cpus=os.cpu_count(), object_store_memory=100 * 2**20, include_dashboard=False)
    made = started(lambda: Cluster(True, head_node_args=dict(_system_config=IMPATIENT, **size)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", made.address)
        try:
            yield made, [made.head_node, started(lambda: made.add_node(**size))]
        finally:
            made.shutdown()


def training(seed=0, **changes):
    recipe = dataclasses.replace(RECIPE, seed=seed, **changes)
    return TrainRun("digits", preset("cct_2_3x1", "SA L2Q"), recipe, images=256)


def search(budget):
    first = dataclasses.replace(RECIPE, epochs=2)
    return SearchRun("digits", sas.Search(preset("cct_2_3x1", "SA L2Q"), first, first, budget=budget), images=256)


def workers(node):
    """The processes of a node that train."""
    with contextlib.suppress(psutil.NoSuchProcess, KeyError):  # it, or its node, has ended
        started = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        return [each for each in started if "ray::_train" in " ".join(each.cmdline())]
    return []


def untimed(record):
    """What two trainings with the same seed and threads have in common, to the last bit."""
    drop = ("seconds", "images_per_second", "nas_seconds", "nas")
    epochs = [record["history"], record["metrics"].get("nas", [])]
    kept = [[{name: fact for name, fact in facts.items() if name not in drop} for facts in each] for each in epochs]
    metrics = {name: value for name, value in record["metrics"].items() if name not in drop}
    return record["key"], record["config"], record["seed"], metrics, kept


TRAININGS = """
from salvit_core import preset
from salvit_core.experiments import cluster, execute, runs
from salvit_core.training import Recipe
cluster.EVERY = 0.1
recipe = Recipe(epochs=40, batch=64, lr=2e-3, augment="none")
print(execute.collect([runs.TrainRun("digits", preset("cct_2_3x1", "SA L2Q"), recipe, images=256)]).absent)
"""


@pytest.mark.processes
@pytest.mark.xdist_group("ray")
def test_a_study_that_is_killed_leaves_no_worker_and_goes_on(nodes, root):
    first = new_code_cell('profile = "quick"', metadata={"tags": ["parameters"]})
    made = new_notebook(cells=[first, new_code_cell(TRAININGS)])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (root / "notebooks").mkdir()
    nbformat.write(made, root / "notebooks" / "00_first.ipynb")
    words = ["study", "--engine", "ray", "--profile", "smoke", "--notebooks", root / "notebooks"]
    command = [sys.executable, "-m", "salvit_core.cli", *words]
    options = dict(env={**os.environ, "SALVIT_ROOT": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen(command, **options) as process:
        while not (come := list(root.rglob("checkpoint.pt"))):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
    known, end = torch.load(come[0], weights_only=True)["history"], time.monotonic() + 20
    while any(map(workers, nodes[1])) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(workers, nodes[1])) and not list(root.rglob("*.json"))
    again = subprocess.run(command, **options, timeout=120)
    assert again.returncode == 0, again.stdout
    (record,) = store.load("training")
    assert len(record["history"]) == 40 and not list(root.rglob("*.unfinished"))
    assert record["history"][: len(known)] == known  # with their seconds: it did not begin anew


@pytest.mark.processes
@pytest.mark.xdist_group("ray")
def test_one_that_fails_is_said_and_does_not_end_the_others(nodes, monkeypatch):
    broken, sound = training(lr=1e30, epochs=3), training(epochs=1)
    one = dataclasses.replace(RECIPE, epochs=1)
    whole = ReplacementRun(sound, Distillation("multi_lstm", attention=one, blocks=None, head=None))
    pruned = dataclasses.replace(whole, pruning=Pruning(share=0.5, sparsify=None, finetune=one))
    monkeypatch.setattr(evidence, "campaign", lambda name: [broken, sound, whole, pruned])
    with pytest.raises(FloatingPointError, match="^digits cct_2_3x1 SA L2Q 3 epochs seed 0: .* epoch"):
        evidence.run(evidence.Evidence(engine="ray"))
    assert store.find(sound) and not store.find(broken)
    facts = store.find(pruned)["metrics"]  # whose weights came back with their hidden sizes
    assert facts["parameters"] < facts["parameters_before"] == store.find(whole)["metrics"]["parameters"]
    assert sum(layer.numel() for layer in execute.trained(pruned).parameters()) == facts["parameters"]


@pytest.mark.processes
@pytest.mark.xdist_group("ray")
def test_a_node_that_dies_costs_no_record(nodes, root, monkeypatch, tmp_path_factory):
    """Teacher, pupil, and two searches of one first phase among them; what one machine makes of them is the same."""
    pupil = dataclasses.replace(training(seed=2, distill_logits=1.0), teacher=training())
    wanted = [pupil, training(), training(seed=1), search(1), search(2)]
    sent, send, killed = [], cluster.Nodes._send, []
    monkeypatch.setattr(cluster.Nodes, "_send", lambda pool, run, future: sent.append(run) or send(pool, run, future))

    def kill():
        while not (list(root.rglob("checkpoint.pt")) and all(map(workers, nodes[1]))):
            time.sleep(0.05)
        nodes[0].remove_node(nodes[1][1], allow_graceful=False)
        killed.append(nodes[1][1])

    threading.Thread(target=kill, daemon=True).start()
    found = execute.collect(wanted, engine="ray")
    assert killed and len(sent) > len(wanted) == len(found)  # some went out again
    assert all(store.path(run, ending=".pt").exists() for run in wanted)
    assert not list(root.rglob("*.unfinished")) and len(list(root.rglob("nas.pt"))) == 1
    assert {record["commit"] for record in found.values()} == {store.commit()}
    monkeypatch.setattr(workspace, "ROOT", tmp_path_factory.mktemp("plain"))
    monkeypatch.setattr(execute, "MOST_TOGETHER", 1)  # in this process, which has one thread, as a node's workers have
    for run, record in execute.collect(wanted).items():
        assert untimed(record) == untimed(found[run])


def test_without_a_cluster_it_says_how_to_begin_one(monkeypatch):
    def absent(*arguments, **options):
        raise ConnectionError("could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", absent)
    with pytest.raises(ValueError, match="finds no cluster .*: begin one with `ray start --head`, or name one in RAY_"):
        execute.collect([training()], engine="ray")

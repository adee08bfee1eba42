"""The README's numbers are those of the project's records, and what it links to is there."""

import dataclasses
import json
import re
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from salvit_core import MECHANISMS, METHODS, adopt, compat, preset
from salvit_core.experiments import latency, profiles, store
from salvit_core.experiments.runs import SearchRun, name_of, run_of
from salvit_core.private import estimate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LABELS = {"SA softmax (baseline)": "SA softmax", "SA 2Quad (MPCFormer)": "SA 2Quad"}


def cells(line):
    return [cell.strip() for cell in line.strip("|\n ").split("|")]


def rows(heading):
    """The lines of the table whose header begins with `heading`."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading}"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [cells(line) for line in lines[start + 2 : end]]


def thirteen():
    """Records of the paper's variants by run, and what `latency.totals` makes of them."""
    found = {run: record for run, record in private().items() if run.provider == "TFP" and single(run)}
    found = {run: r for run, r in found.items() if (name := name_of(run.network)) and name[1] in METHODS}
    found = {run: record for run, record in found.items() if name_of(run.network)[0] == "cct_7_3x1"}
    return found, latency.totals(latency.operations(found))


def private():
    return {run_of(record): record for record in store.load("private", "reference")}


def single(run):
    """One query of one image of the whole network, on the bare loopback."""
    return (run.queries, run.batch, run.link, run.alone) == (1, 1, None, False)


def test_latencies_are_those_on_record():
    found, table = thirteen()
    assert set(table["queries"]) == {3}
    errors = defaultdict(float)
    for run, record in found.items():
        which = run.protocol, name_of(run.network)[1]
        errors[which] = max(errors[which], record["metrics"]["logit_error"])
    paper = pd.concat([pd.read_csv(ROOT / "data" / "paper" / f"table_{n}.csv") for n in (3, 4)])
    paper = paper[paper["dataset"] == "cifar10"].groupby("method")["latency_s"].first()
    shown = rows("attention, normaliser")
    assert len(shown) == len(table.loc["stock"]) == len(table.loc["tuned"])
    for label, *told, theirs, wrong, right in shown:
        name = LABELS.get(label, label)
        each = [table.loc[(protocol, name)] for protocol in ("stock", "tuned")]
        expected = [f"{row['seconds']:.1f} ({row['low']:.1f} to {row['high']:.1f})" for row in each]
        expected += [f"{row['rounds']:.0f}" for row in each]
        expected += [f"{row['megabytes']:.0f}" for row in each]
        expected += [f"{row['ratio_without_layernorm']:.2f}" for row in each]
        assert told == expected, name
        assert theirs == (f"{paper[name] / paper['SA softmax']:.2f}" if name in paper else "-"), name
        assert [wrong, right] == [f"{errors[protocol, name]:.2g}" for protocol in ("stock", "tuned")], name


def test_whole_networks_of_table_2_are_those_on_record():
    known = [preset("cct_7_3x1", name) for name in MECHANISMS]
    found = {
        (run.network.attention[0], run.protocol): f"{latency.costs(record)['seconds']:.1f}"
        for run, record in private().items()
        if run.query == 0 and single(run) and dataclasses.replace(run.network, memory=64) in known
    }
    _, table = thirteen()
    shown = {label: told[-3:-1] for label, *told in rows("one attention layer")}
    assert len(shown) == 10
    for label, told in shown.items():
        if label in METHODS:
            expected = [f"{table.loc[(protocol, label), 'seconds']:.1f}" for protocol in ("stock", "tuned")]
        else:
            expected = [found[MECHANISMS[label]["attention"], protocol] for protocol in ("stock", "tuned")]
        assert told == expected, label


def test_the_benchmark_is_the_one_on_record():
    found = (ROOT / "data" / "reference" / "benchmarks" / "private.md").read_text().splitlines()
    lines = [cells(line) for line in found if line.startswith(("| SAL-ViT B=3 |", "| SA softmax |"))]
    expected = [
        [network, variant, seconds.split()[0], *rest, error.split(",")[0]]
        for network, variant, seconds, *rest, error in lines
    ]
    assert rows("network | variant") == expected and len(expected) == 8


def test_the_training_benchmark_is_the_one_on_record():
    path = ROOT / "data" / "reference" / "benchmarks" / "training.json"
    found = {(row["row"], row["variant"]): row for row in json.loads(path.read_text())["rows"]}
    shown = rows("step | recipe")
    assert len(shown) == len(found) / 2
    for step, *told in shown:
        recipe, ours = found[step, "recipe"], found[step, "ours"]
        expected = [f"{recipe['images_per_second']:.1f}", f"{ours['images_per_second']:.1f}", f"{ours['speedup']:.1f}"]
        expected += [f"{ours['bound']:.0f}", f"{recipe['process_mib']:.0f} / {ours['process_mib']:.0f}"]
        assert told == expected, step


def test_efficient_attention_is_that_on_record():
    size = profiles.profile("reference")
    network = {
        size.config("cifar10", name): name for name in ("SA softmax", "SA L2Q", "EA softmax", "EA L2Q", *MECHANISMS)
    }
    trained = {
        network[run.network]: record["metrics"]["test_accuracy"]
        for record in store.load("training", "reference")
        if (run := run_of(record)).images == 15_000 and run.recipe.epochs == 6
    }
    queries = {}
    for run, record in private().items():
        if run.network in network and (run.protocol, run.provider) == ("tuned", "TFP") and single(run):
            queries.setdefault(network[run.network], []).append(latency.costs(record))
    assert {len(found) for found in queries.values()} == {3}
    shares = {
        name: (
            f"{statistics.median(cost['seconds'] for cost in found):.2f}",
            f"{found[0]['rounds']:.0f}",
            f"{found[0]['bytes'] / 1e6:.1f}",
        )
        for name, found in queries.items()
    }
    flops = {
        network[run.network]: f"{record['metrics']['flops'] / 1e6:.1f}"
        for record in store.load("clear", "reference")
        if (run := run_of(record)).network in network and not run.alone
    }
    shown = {name: tuple(told) for name, *told in rows("attention | test accuracy")}
    assert shown == {name: (f"{accuracy:.2f}", flops[name], *shares[name]) for name, accuracy in trained.items()}
    assert len(shown) == 17


def test_accuracies_are_those_on_record():
    def key(run):
        if isinstance(run, SearchRun):
            return run.network.normalizer, run.search.rule, run.search.budget
        network = run.network
        if not (network.l2q_learn_c and network.l2q_learn_d):
            return "C only" if network.l2q_learn_c else "D only"
        kind = network.l2q_granularity if network.normalizer == "l2q" else network.normalizer
        return network.attention[0], kind

    found = {
        key(run): record["metrics"]["test_accuracy"]
        for study in ("training", "search")
        for record in store.load(study, "reference")
        # others have fewer images, are the campaign's, or of the paper's network (profile short)
        if not (run := run_of(record)).images and run.seed == 0 and run.network.layers == 4
    }
    expected = {
        "SA softmax": [("self", "softmax")],
        "SA 2Quad": [("self", "2quad")],
        "SA L2Q global / head-wise / element-wise": [("self", "global"), ("self", "head"), ("self", "element")],
        "SA L2Q, C only / D only *": ["C only", "D only"],
        "SA scaling *": [("scaling", "softmax")],
        "EA softmax": [("external", "softmax")],
        "EA L2Q *": [("external", "element")],
        "SAL-ViT, top alpha, B = 1 / 2 / 3": [("l2q", "top", b) for b in (1, 2, 3)],
        "worst case, lowest alpha, B = 1 / 2 / 3": [("l2q", "bottom", b) for b in (1, 2, 3)],
        "SAL-ViT, top alpha, B = 2, with softmax / 2Quad / 2ReLU *": [
            (n, "top", 2) for n in ("softmax", "2quad", "2relu")
        ],
    }
    shown = {label: ours for label, ours, _ in rows("network | ours")}
    assert shown == {label: " / ".join(f"{found[k]:.2f}" for k in keys) for label, keys in expected.items()}


def test_accuracies_of_the_papers_network_are_those_on_record():
    names = {
        ("self", "softmax"): "SA softmax",
        ("self", "l2q"): "SA L2Q",
        ("self", "2quad"): "SA 2Quad",
        ("external", "l2q"): "EA L2Q",
        ("external", "softmax"): "EA softmax",
    }
    found = {}
    for study in ("training", "search"):
        for record in store.load(study, "reference"):
            run = run_of(record)
            if not run.images and run.network.layers == 7:
                searched = isinstance(run, SearchRun)
                kind = (run.network.attention[0], run.network.normalizer)
                label = "SAL-ViT, top alpha, B = 3" if searched else names[kind]
                found[label, run.data] = f"{record['metrics']['test_accuracy']:.2f}"
    shown = {}
    for label, *both in rows("CCT-7/3x1, 12 epochs"):
        shown |= {(label, data): told for data, told in zip(("cifar10", "cifar100"), both, strict=True) if told != "-"}
    assert shown == found and len(found) == 8


def test_trained_networks_stay_well_within_the_ranges_of_tuned():
    found = [r for r in store.load("encrypted", "reference") if r["config"]["protocol"] == "tuned"]
    assert max(r["metrics"]["images"] for r in found) >= 256
    for record in found:
        assert record["metrics"]["violations"] == [] and len(record["metrics"]["ranges"]) > 15
        assert min(row["margin"] for row in record["metrics"]["ranges"]) > 3
        if record["config"]["bits"] is None:
            assert record["metrics"]["agreement"] >= 99 and record["metrics"]["largest_error"] < 0.05


def test_the_five_lines_for_a_network_of_one_s_own_run():
    """All but the private inference itself, which tests/private/test_private_foreign.py has."""
    (lines,) = re.findall(r"### Your own network.*?```python\n(.*?)```", README, re.S)
    assert lines.count("\n") == 5
    called = []
    room = SimpleNamespace(infer=lambda *images, **options: called.append(options), estimate=estimate)
    library = SimpleNamespace(models=compat.torchvision("models"))
    names = {"torch": torch, "torchvision": library, "adopt": adopt, "private": room}
    *statements, last = lines.strip().split("\n")
    exec("\n".join(statements), names)
    plain, cheap = eval(last, names)
    assert cheap < 0.8 * plain and called == [{"protocol": "tuned"}]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link):
    tracked = subprocess.run(["git", "ls-files", link], cwd=ROOT, capture_output=True, text=True).stdout
    assert tracked.strip(), f"{link} is not in the repository"

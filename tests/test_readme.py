"""The README's numbers are those of the project's records, and what it links to is there."""

import json
import re
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest

from salvit_core import MECHANISMS, METHODS, preset, profiles, records
from salvit_core.cct import config_of
from salvit_core.private import latency

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
    """Records of the paper's variants, and what `latency.totals` makes of them."""
    found = [record for record in records.load("latency", "reference") if latency.name_of(record)]
    found = [r for r in found if r["config"]["provider"] == "TFP" and latency.name_of(r)[1] in METHODS]
    found = [r for r in found if latency.name_of(r)[0] == "cct_7_3x1"]
    return found, latency.totals(latency.operations(found))


def test_latencies_are_those_on_record():
    found, table = thirteen()
    assert set(table["queries"]) == {3}
    errors = defaultdict(float)
    for record in found:
        which = record["config"]["protocol"], latency.name_of(record)[1]
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
    found = {
        (r["config"]["network"]["attention"][0], r["config"]["protocol"]): f"{r['metrics']['seconds']:.1f}"
        for r in records.load("latency", "reference")
        if r["config"]["query"] == 0
        and config_of({**r["config"]["network"], "memory": 64}) in [preset("cct_7_3x1", name) for name in MECHANISMS]
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
        [network, protocol, seconds.split()[0], *rest, error.split(",")[0]]
        for network, protocol, seconds, *rest, error in lines
    ]
    assert rows("network | protocol") == expected and len(expected) == 4


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
    size = profiles.profile("cpu")
    network = {
        size.config("cifar10", name): name for name in ("SA softmax", "SA L2Q", "EA softmax", "EA L2Q", *MECHANISMS)
    }
    trained = {
        network[config_of(r["config"]["network"])]: r["metrics"]["test_accuracy"]
        for r in records.load("training", "reference")
        if r["config"]["images"] == 15_000
    }
    queries = {}
    for r in records.load("latency", "reference"):
        config, which = config_of(r["config"]["network"]), (r["config"]["protocol"], r["config"]["provider"])
        if config in network and which == ("tuned", "TFP"):
            queries.setdefault(network[config], []).append(r["metrics"])
    assert {len(found) for found in queries.values()} == {3}
    private = {
        name: (
            f"{statistics.median(m['seconds'] for m in found):.2f}",
            f"{found[0]['rounds']}",
            f"{found[0]['bytes'] / 1e6:.1f}",
        )
        for name, found in queries.items()
    }
    flops = {
        network[config]: f"{r['metrics']['flops'] / 1e6:.1f}"
        for r in records.load("clear", "reference")
        if (config := config_of(r["config"]["network"])) in network and not r["config"]["alone"]
    }
    shown = {name: tuple(told) for name, *told in rows("attention | test accuracy")}
    assert shown == {name: (f"{accuracy:.2f}", flops[name], *private[name]) for name, accuracy in trained.items()}
    assert len(shown) == 17


def test_accuracies_are_those_on_record():
    def key(record):
        network = record["config"]["network"]
        if record["study"] == "search":
            return network["normalizer"], record["config"]["rule"], record["config"]["budget"]
        if not (network["l2q_learn_c"] and network["l2q_learn_d"]):
            return "C only" if network["l2q_learn_c"] else "D only"
        kind = network["l2q_granularity"] if network["normalizer"] == "l2q" else network["normalizer"]
        return network["attention"][0], kind

    found = {
        key(r): r["metrics"]["test_accuracy"]
        for s in ("training", "search")
        for r in records.load(s, "reference")
        if not r["config"]["images"]  # notebook 06's are of fewer images
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


def test_trained_networks_stay_well_within_the_ranges_of_tuned():
    found = [r for r in records.load("encrypted", "reference") if r["config"]["protocol"] == "tuned"]
    assert max(r["metrics"]["images"] for r in found) >= 256
    for record in found:
        assert record["metrics"]["violations"] == [] and len(record["metrics"]["ranges"]) > 15
        assert min(row["margin"] for row in record["metrics"]["ranges"]) > 3
        if record["config"]["bits"] is None:
            assert record["metrics"]["agreement"] >= 99 and record["metrics"]["largest_error"] < 0.05


def test_reference_records_say_where_they_are_from():
    for study in ("latency", "training", "search", "learned"):
        found = records.load(study, "reference")
        assert found, study
        for record in found:
            assert record["source"] == "measured" and record["machine"]["processor"] and record["date"]
            assert record["versions"]["torch"] == "2.13.0" or record["versions"]["torch"].startswith("2.13.0+")
            assert record["commit"] and not record["commit"].endswith("+"), record["key"]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link):
    tracked = subprocess.run(["git", "ls-files", link], cwd=ROOT, capture_output=True, text=True).stdout
    assert tracked.strip(), f"{link} is not in the repository"

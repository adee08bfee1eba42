"""The project's own records: found by the runs that made them, their numbers as they were, and honest."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from salvit_core import workspace
from salvit_core.experiments import migrate, store
from salvit_core.experiments.runs import RUNS, run_of

# Of every record that was there when records got their present names: old name, name now, a digest of its numbers.
# Those of private and of clear costs were measured again on 2026-11-27, and softmax attention's first seed was trained
# again then: 70.22 % for 67.70, told on the page of results.
KNOWN = json.loads(Path(__file__).with_name("records.json").read_text())
REFERENCE = Path(__file__).parents[2] / "data" / "reference"


def digest(record):
    text = json.dumps([record["metrics"], record["history"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def records():
    return {
        f"{path.parent.name}/{path.stem}": json.loads(path.read_text())
        for study in RUNS
        for path in REFERENCE.glob(f"{study}/*.json")
    }


def said(config, recorded):
    """A config without the fields that a record does not have."""
    if not isinstance(recorded, dict):
        return config
    return {name: said(value, recorded[name]) for name, value in config.items() if name in recorded}


def test_every_record_is_found_by_the_run_that_made_it(records):
    assert len(records) >= 394
    for name, record in records.items():
        run = run_of(record)
        assert f"{run.study}/{store.name(run)}" == name and store.key(run) == record["key"]
        # All of it, but for fields that came later, which then have their defaults.
        assert said(json.loads(json.dumps(dataclasses.asdict(run))), record["config"]) == record["config"]
        assert store.find(run, "reference") == record


def test_their_numbers_are_what_they_were(records):
    assert len(KNOWN) == 394
    for name, (now, numbers) in KNOWN.items():
        assert digest(records[now]) == numbers, name


def test_they_say_where_they_are_from(records):
    for name, record in records.items():
        assert record["source"] == "measured" and record["machine"]["processor"] and record["date"], name
        lent = "accelerator" in record["machine"]
        assert record["versions"]["torch"].startswith("2.11.0" if lent else "2.13.0"), name
        assert record["commit"] and not record["commit"].endswith("+"), name


OLDER = {
    "latency": {"network": "@", "query": 2, "protocol": "stock", "provider": "TFP", "seed": 0},
    "sessions": {
        **{"network": "@", "batch": 2, "queries": 3, "protocol": "tuned", "provider": "TTP", "seed": 0, "alone": True},
        "link": {"rtt": 0.04, "bandwidth": 44e6},
    },
}


@pytest.mark.parametrize("study", OLDER)
def test_records_of_the_first_layout_are_moved(tmp_path, monkeypatch, study, records):
    network = next(record["config"]["network"] for record in records.values() if record["study"] == "private")
    record = {
        **{"study": study, "key": "0123456789abcdef", "config": {**OLDER[study], "network": network}},
        **{"metrics": {"operations": [{"seconds": 1.5}]}, "history": [], "source": "measured"},
    }
    folder = tmp_path / "data" / "runs"
    (folder / study).mkdir(parents=True)
    (folder / study / "0123456789abcdef.json").write_text(json.dumps(record))
    (folder / study / "0123456789abcdef.pt").write_text("weights")
    assert len(migrate.migrate(folder)) == 1
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    (moved,) = store.load("private")
    run = run_of(moved)
    assert (run.protocol, run.seed) == (OLDER[study]["protocol"], 0) and moved["metrics"] == record["metrics"]
    assert store.find(run) == moved and store.path(run, ending=".pt").read_text() == "weights"
    assert migrate.migrate(folder) == {} and not (folder / study).exists()


def test_what_is_of_no_layout_is_named(tmp_path):
    (tmp_path / "tea").mkdir()
    (tmp_path / "tea" / "1.json").write_text('{"study": "tea", "key": "1", "config": {}}')
    with pytest.raises(ValueError, match="record '1' is of study 'tea', which no layout knows"):
        migrate.migrate(tmp_path)

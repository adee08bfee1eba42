"""Records: found instead of recomputed, whole or absent, honest about where they come from."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from salvit_core import records


@dataclass(frozen=True)
class Config:
    size: int
    seed: int = 0


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    return tmp_path


def test_a_run_is_computed_once():
    calls = []

    def run(config):
        calls.append(config)
        return {"accuracy": 0.5, "history": [1, 2]}

    first, second = (records.ensure("study", Config(3, seed=7), run) for _ in range(2))
    assert first == second and len(calls) == 1
    assert first["metrics"] == {"accuracy": 0.5} and first["history"] == [1, 2]
    assert first["config"] == {"size": 3, "seed": 7} and first["seed"] == 7
    assert first["source"] == "measured" and first["machine"]["cores"] == os.cpu_count()
    assert first["versions"]["torch"] and first["wall_seconds"] >= 0 and first["date"]


def test_another_config_is_another_run():
    keys = {
        records.key("a", Config(1)),
        records.key("a", Config(2)),
        records.key("b", Config(1)),
        records.key("a", Config(1, 1)),
    }
    assert len(keys) == 4


def test_key_is_stable():
    """A key that changes orphans every record that people have."""
    assert records.key("study", Config(3)) == "b5e1401d2cdbb28c"


def test_a_failed_run_leaves_nothing(root):
    with pytest.raises(RuntimeError):
        records.ensure("study", Config(1), lambda config: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(ValueError):
        records.ensure("study", Config(2), lambda config: {"loss": float("nan")})
    assert not list(root.rglob("*.json*"))


def test_a_broken_record_is_named(root):
    path = root / "data" / "runs" / "study" / f"{records.key('study', Config(1))}.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"half": ')
    with pytest.raises(ValueError, match=r"\.json is not JSON .*: delete it"):
        records.ensure("study", Config(1), lambda config: {})


def test_reference_records_are_only_read():
    with pytest.raises(FileNotFoundError, match="no reference record study/"):
        records.ensure("study", Config(1), lambda config: pytest.fail("computed"), source="reference")
    with pytest.raises(ValueError, match="records 'elsewhere' are unknown: choose from local, reference"):
        records.folder("elsewhere")


def test_table_and_caption():
    for size in (1, 2):
        records.ensure("study", Config(size), lambda config: {"value": config.size * 2})
    found = records.load("study")
    table = records.table(found)
    assert sorted(zip(table["config.size"], table["metrics.value"])) == [(1, 2), (2, 4)]
    assert records.caption(found).startswith("measured: 2 runs, 20") and records.caption([]) == "no records"
    assert len(records.listing(found)) == 2


KILLED = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from salvit_core import records
records.ROOT = Path(sys.argv[1])

@dataclass(frozen=True)
class Config:
    size: int
    seed: int = 0

def run(config):
    time.sleep(0.2)
    return {"square": config.size ** 2, "text": "x" * 200_000}

for size in range(40):
    records.ensure("study", Config(size), run)
"""


def test_two_processes_may_write_one_file_at_a_time(tmp_path):
    path = tmp_path / "checkpoint.pt"

    def interrupted(file):
        file.write(b"ours")
        other = multiprocessing.get_context("fork").Process(target=records.write, args=(path, "theirs"))
        other.start()
        other.join()
        assert other.exitcode == 0 and path.read_bytes() == b"theirs"

    records.write(path, interrupted)
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]


def test_no_room(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("before")

    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = "cannot write .*record.json .No space left on device.: make room"
    with pytest.raises(OSError, match=message) as caught:
        records.write(path, full)
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_killed_at_any_moment_it_goes_on(root):
    command = [sys.executable, "-c", KILLED, str(root)]
    for pause in (0.0, 0.1, 0.25):  # after the first record of its own: its start takes as long as the machine is slow
        before = len(list(root.rglob("*.json")))
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
        while len(list(root.rglob("*.json"))) == before:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for path in (root / "data" / "runs").rglob("*.json"):
            json.loads(path.read_text())
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.json")}
    assert 0 < len(before) < 40
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    found = records.load("study")
    assert sorted(record["metrics"]["square"] for record in found) == [size**2 for size in range(40)]
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())

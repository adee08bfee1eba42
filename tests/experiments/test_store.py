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
from typing import ClassVar

import pytest
import torch

from salvit_core import workspace
from salvit_core.experiments import store


@dataclass(frozen=True)
class Part:
    width: int = 4
    depth: int = 2
    unused: float = 0.5

    def ignored(self):
        return {"unused"}


@dataclass(frozen=True)
class Config:
    study: ClassVar[str] = "study"

    size: int
    seed: int = 0
    part: Part = Part()

    def label(self):
        return f"Size {self.size}, a {'B' * self.seed}=3"


@dataclass(frozen=True)
class Other(Config):
    study: ClassVar[str] = "other"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    return tmp_path


def test_a_run_is_measured_once():
    calls = []

    def measure(config):
        calls.append(config)
        return {"accuracy": 0.5, "history": [1, 2]}

    first, second = (store.ensure(Config(3, seed=7), measure) for _ in range(2))
    assert first == second and len(calls) == 1
    assert first["metrics"] == {"accuracy": 0.5} and first["history"] == [1, 2]
    assert first["config"] == {"size": 3, "seed": 7, "part": {"width": 4, "depth": 2, "unused": 0.5}}
    assert first["seed"] == 7
    assert first["source"] == "measured" and first["machine"]["cores"] == os.cpu_count()
    assert first["versions"]["torch"] and first["wall_seconds"] >= 0 and first["date"]


def test_another_config_is_another_run():
    keys = {store.key(run) for run in (Config(1), Config(2), Other(1), Config(1, 1), Config(1, part=Part(5)))}
    assert len(keys) == 5


def test_a_key_is_stable():
    """A key that changes orphans every record that people have."""
    assert store.canonical(Config(3)) == {"version": 1, "study": "study", "type": "Config", "size": 3}
    assert store.canonical(Config(3, part=Part(depth=3))) == {
        "version": 1,
        "study": "study",
        "type": "Config",
        "size": 3,
        "part": {"type": "Part", "depth": 3},
    }
    assert store.key(Config(3)) == "eb3dd25c681015a7"


def test_what_is_ignored_or_at_its_default_moves_no_key():
    assert store.key(Config(3)) == store.key(Config(3, 0, Part(unused=0.9)))

    @dataclass(frozen=True)
    class Later(Config):
        later: float = 1.5

    Later.__name__ = "Config"
    assert store.key(Later(3)) == store.key(Config(3)) != store.key(Later(3, later=1.0))
    assert store.key(Later(3, later=1)) == store.key(Later(3, later=1.0))  # a whole number is one number


def test_a_file_has_a_name_for_people(root):
    run = Config(3, seed=2)
    store.ensure(run, lambda config: {})
    (file,) = (root / "data" / "runs" / "study").iterdir()
    assert file.name == f"size-3-a-bb-3_{store.key(run)[:8]}.json" and file == store.path(run)


def test_a_failed_run_leaves_nothing(root):
    with pytest.raises(RuntimeError):
        store.ensure(Config(1), lambda config: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(ValueError):
        store.ensure(Config(2), lambda config: {"loss": float("nan")})
    assert not list(root.rglob("*.json*"))


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"half": ', r"\.json is not JSON .*: delete it"),
        (b"\xff\xfe", r"\.json is not JSON .*: delete it"),
        ("[1]", r"\.json is not a record: delete it"),
        ("{}", r"\.json is not a record: delete it"),
        (
            '{"study": "study", "key": "0", "config": {}, "metrics": {}}',
            r"is of another run: its key is '0', asked was",
        ),
    ],
)
def test_a_broken_record_is_named(content, message):
    path = store.path(Config(1))
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        store.ensure(Config(1), lambda config: {})


def test_reference_records_are_only_read(root):
    assert store.find(Config(1), "reference") is None
    assert list(root.iterdir()) == []
    with pytest.raises(ValueError, match="records 'elsewhere' are unknown: choose from local, reference"):
        store.folder("elsewhere")


def test_caption_and_listing():
    for size in (1, 2):
        store.ensure(Config(size), lambda config: {"value": config.size * 2})
    found = store.load("study")
    assert sorted((record["config"]["size"], record["metrics"]["value"]) for record in found) == [(1, 2), (2, 4)]
    day, machine = found[0]["date"][:10], found[0]["machine"]
    on = f"{machine['processor']}, {machine['cores']} cores"
    assert store.caption(found) == f"measured: 2 runs, seed 0, {day}, {on}" and store.caption([]) == "no records"
    assert store.caption(found[:1]).startswith("measured: 1 run, seed 0, ")
    seeds = [dict(record, seed=seed) for record, seed in zip(found, (1, None), strict=True)]
    assert "2 runs, seed 1, " in store.caption(seeds) and "seeds 0, 1, " in store.caption([*found, *seeds])
    listed = store.listing([*found, *found])
    assert len(listed) == 2
    # Versions stand here, and not in captions.
    assert (listed["torch"] == torch.__version__).all() and "python" in listed


KILLED = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from salvit_core import workspace
from salvit_core.experiments import store
workspace.ROOT = Path(sys.argv[1])

@dataclass(frozen=True)
class Config:
    size: int
    seed: int = 0
    study = "study"

    def label(self):
        return f"size {self.size}"

def measure(config):
    with open(sys.argv[1] + "/measured", "a") as file:
        file.write(f"{config.size}\\n")
    time.sleep(0.1)
    return {"square": config.size ** 2, "text": "x" * 200_000}

for size in range(20):
    store.ensure(Config(size), measure)
"""


def test_two_processes_may_write_one_file_at_a_time(tmp_path):
    path = tmp_path / "checkpoint.pt"

    def interrupted(file):
        file.write(b"ours")
        other = multiprocessing.get_context("fork").Process(target=workspace.write, args=(path, "theirs"))
        other.start()
        other.join()
        assert other.exitcode == 0 and path.read_bytes() == b"theirs"

    workspace.write(path, interrupted)
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]


def test_no_room(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("before")

    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = "cannot write .*record.json .No space left on device.: make room"
    with pytest.raises(OSError, match=message) as caught:
        workspace.write(path, full)
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


@pytest.mark.processes
def test_killed_at_any_moment_it_goes_on(root):
    command = [sys.executable, "-c", KILLED, str(root)]
    for pause in (0.0, 0.1, 0.25):  # after the first record of its own: its start takes as long as the machine is slow
        before = len(list(root.rglob("*.json")))
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        while len(list(root.rglob("*.json"))) == before:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for path in (root / "data" / "runs").rglob("*.json"):
            json.loads(path.read_text())
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.json")}
    assert 0 < len(before) < 20
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    found = store.load("study")
    assert sorted(record["metrics"]["square"] for record in found) == [size**2 for size in range(20)]
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())


@pytest.mark.processes
def test_two_processes_that_want_the_same_records_measure_each_once(root):
    """One measures, the other waits and takes what was written."""
    command = [sys.executable, "-c", KILLED, str(root)]
    both = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    measured = (root / "measured").read_text().split()
    assert sorted(map(int, measured)) == list(range(20))


def test_an_accelerator_is_part_of_the_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100")
    machine = store.machine.__wrapped__()
    assert machine["accelerator"] == "NVIDIA H100"
    record = {**store.circumstances(), "machine": {**machine, "processor": "Xeon", "cores": 16}}
    assert store.caption([record]).endswith("NVIDIA H100 beside Xeon, 16 cores")

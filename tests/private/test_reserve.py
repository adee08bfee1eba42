"""Correlations dealt ahead of time: right, for one thing, and never used twice, whatever is killed when."""

import contextlib
import json
import os
import random
import threading
import time

import pytest
import torch
from test_parties import by_hand, ended, started
from test_private_faults import parties
from test_private_launch import free_port, images, model
from torch import nn

from salvit_core import private
from salvit_core.models.graph import trace
from salvit_core.private.parties import launch, party
from salvit_core.private.protocol import DEALT
from salvit_core.private.reserve import Reserve, ReserveError, mark_of

KEY = bytes(range(16))


def filled(path, queries=4, corrections=(), **terms):
    reserve = Reserve.new(path)
    for query in range(queries):
        reserve.put(query, bytes([query]) * 16, corrections)
    reserve.seal(KEY, {"w": torch.arange(3)}, {"queries": queries, "bits": 13, **terms})
    return path


@contextlib.contextmanager
def opened(path):
    """As by a process of its own, with which the lock goes."""
    reserve = Reserve.opened(path)
    yield reserve
    os.close(reserve._log)


def test_what_is_put_is_drawn_once(tmp_path):
    parts = [torch.arange(5), torch.arange(7)]
    path = filled(tmp_path / "reserve", corrections=parts)
    with opened(path) as reserve:
        assert reserve.weights()[0] == KEY and torch.equal(reserve.weights()[1]["w"], torch.arange(3))
        assert reserve.next == 0
        key, corrections = reserve.draw(1)  # the other party had drawn query 0 already
        assert key == bytes([1]) * 16 and torch.equal(corrections, torch.cat(parts))
        for query in (0, 1):
            with pytest.raises(ReserveError, match=f"query {query} was drawn before"):
                reserve.draw(query)
    with opened(path) as reserve:
        assert reserve.next == 2
        reserve.draw(3)
        with pytest.raises(ReserveError, match="used up: all 4 queries were drawn"):
            reserve.draw(4)
        with pytest.raises(ReserveError, match="0 queries left and 1 are wanted"):
            reserve.insist(1)
    assert {file.name for file in path.iterdir()} == {"reserve.json", "weights", "drawn"}
    assert all(file.stat().st_mode & 0o077 == 0 for file in (path, *path.iterdir()))


def test_a_query_is_drawn_before_its_key_is_read(tmp_path, monkeypatch):
    path = filled(tmp_path / "reserve")
    with opened(path) as reserve:
        (path / "0.key").unlink()
        with pytest.raises(FileNotFoundError):
            reserve.draw(0)
    with opened(path) as reserve:
        assert reserve.next == 1


def test_a_line_that_was_cut_off_counts_for_nothing(tmp_path):
    path = filled(tmp_path / "reserve", queries=20)
    (path / "drawn").write_bytes(b"0\n1\n1")  # of "10", which was not synced, so that nothing of it was read
    with opened(path) as reserve:
        assert reserve.next == 2
        reserve.draw(3)
    assert (path / "drawn").read_bytes() == b"0\n1\n3\n"


def test_one_process_at_a_time(tmp_path):
    path = filled(tmp_path / "reserve")
    with opened(path), pytest.raises(ReserveError, match="in use by another process"):
        Reserve.opened(path)
    with opened(path):
        pass


def test_what_is_no_reserve_is_refused(tmp_path):
    with pytest.raises(ReserveError, match="no reserve that was filled to its end: fill another with --fill"):
        Reserve.opened(tmp_path / "none")
    half = Reserve.new(tmp_path / "half")
    half.put(0, KEY, [])
    with pytest.raises(ReserveError, match="filled to its end"):
        Reserve.opened(tmp_path / "half")
    with pytest.raises(ReserveError, match="is there already: a reserve is never overwritten"):
        Reserve.new(tmp_path / "half")
    (tmp_path / "file").touch()
    with pytest.raises(ReserveError, match="cannot make .*Not a directory"):
        Reserve.new(tmp_path / "file" / "below")
    damaged = filled(tmp_path / "damaged")
    (damaged / "reserve.json").write_text("{")
    with pytest.raises(ReserveError, match="is damaged"):
        Reserve.opened(damaged)
    short = filled(tmp_path / "short", corrections=[torch.arange(9)])
    (short / "0.corrections").write_bytes(bytes(8))
    with opened(short) as reserve, pytest.raises(ReserveError, match="files of query 0 are cut off"):
        reserve.draw(0)


def test_it_is_for_one_thing(tmp_path):
    with opened(filled(tmp_path / "reserve", shape=[1, 1, 8, 8])) as reserve:
        reserve.check({"bits": 13, "shape": [1, 1, 8, 8]})
        with pytest.raises(ReserveError, match=r"dealt for shape \[1, 1, 8, 8\], this run has \[2, 1, 8, 8\]"):
            reserve.check({"shape": [2, 1, 8, 8]})
    weights = model().state_dict()
    before = mark_of(weights)
    assert mark_of(dict(reversed(weights.items()))) == before
    next(iter(weights.values())).view(-1)[0] += 1e-3
    assert mark_of(weights) != before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--fill=3", "--shape=1,1,8,8"], "--fill needs --reserve"),
        (["--fill=0", "--reserve=r"], "'0': expected a number of queries"),
        (["--reserve=r", "--provider=TFP"], "a reserve is filled by a dealer: give --provider TTP"),
        (["--reserve=r", "--protocol=stock"], "--reserve r: stock deals as it goes, give --protocol tuned"),
        (["--ahead", "--protocol=stock"], "protocol 'stock' deals as it goes: choose tuned to deal ahead"),
        (["--reserve=r", "--fill=2"], "the client needs --shape"),
        (["--reserve=r", "--fill=2", "--shape=1,1,8"], "'1,1,8': expected B,C,H,W"),
    ],
)
def test_command_line_refusals(capsys, words, message):
    common = ["client", "--meet=127.0.0.1:1", "--dealer=127.0.0.1:2", "--protocol=tuned", "--provider=TTP"]
    common += ["--architecture=a"] if "--fill=2" in words else ["--architecture=a", "--images=b", "--result=c"]
    with pytest.raises(SystemExit):
        party.main(common + words)
    assert message in capsys.readouterr().err


# Whole runs


@pytest.mark.processes
@pytest.mark.parametrize("provider", ["TFP", "TTP"])
def test_dealt_ahead_is_the_same_run_less_its_dealing(provider):
    along, ahead = (private.infer(model(), images(), "tuned", provider, dealt=dealt) for dealt in DEALT)
    for result in (along, ahead):
        assert not result.violations and result.error < 0.05
    costs = ["layer", "kind", "rounds", "bytes", "serial_bytes", "offline_bytes"]
    assert ahead.operations[costs].equals(along.operations[costs])
    assert along.offline > 0 and along.dealing < 0.5 * along.offline
    assert ahead.offline < 0.1 * ahead.dealing
    with pytest.raises(ValueError, match="dealt 'before' is unknown: choose from along, ahead"):
        private.infer(model(), images(), "tuned", dealt="before")
    with pytest.raises(ValueError, match="protocol 'stock' deals as it goes"):
        private.infer(model(), images(), dealt="ahead")


@pytest.mark.processes
def test_three_processes_fill_and_two_draw(tmp_path):
    commands = by_hand(tmp_path)
    reserves = {role: f"--reserve={tmp_path / role / 'reserve'}" for role in ("server", "client")}
    fill = {
        role: words + [reserves[role], "--fill=3"] if role in reserves else words for role, words in commands.items()
    }
    fill["client"] = [word for word in fill["client"] if not word.startswith(("--images", "--result"))]
    with started(fill | {"client": fill["client"] + ["--shape=1,1,8,8"]}) as running:
        assert ended(running) == dict.fromkeys(commands, (0, ""))
    draw = {role: [word for word in commands[role] if "dealer" not in word] + [reserves[role]] for role in reserves}
    with torch.no_grad():
        clear = model().eval()(images())
    with started(draw) as running:
        assert ended(running) == dict.fromkeys(draw, (0, ""))
    result = torch.load(tmp_path / "client" / "result.pt")
    torch.testing.assert_close(result["logits"], clear, atol=0.05, rtol=0)
    # Of other weights B would hide two: W - B and W' - B tell W - W'.
    weights = torch.load(tmp_path / "server" / "weights.pt")
    torch.save({name: tensor * 1.5 for name, tensor in weights.items()}, tmp_path / "server" / "weights.pt")
    with started({"server": draw["server"]}) as running:
        status, said = ended(running)["server"]
    assert status == 1 and "was dealt for weights" in said and said.endswith("fill another")
    for role in reserves:
        assert (tmp_path / role / "reserve" / "drawn").read_text() == "0\n"


class Small(nn.Module):
    """A query of this takes a few hundredths of a second."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.act(self.first(x.flatten(1))))


class Killer(threading.Thread):
    """Kills a party of those who meet at a port, some seconds after it is there."""

    def __init__(self, port, victim, after):
        super().__init__()
        self.port, self.victim, self.after, self.over = port, victim, after, threading.Event()
        self.start()

    def run(self):
        while not self.over.is_set():
            if found := parties(self.port).get(self.victim):
                self.over.wait(self.after)
                with contextlib.suppress(Exception):
                    found.kill()
                return
            time.sleep(0.01)


@pytest.mark.processes
def test_no_correlation_is_used_twice_whatever_is_killed_when(tmp_path):
    """Each of the two at 20 moments of drawing, all three at 20 of filling; the logs tell what was drawn."""
    torch.manual_seed(0)
    network, x = Small().eval(), torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        clear = network(x)
    graph, weights, pixels = (tmp_path / name for name in ("graph.pt", "weights.pt", "images.pt"))
    torch.save(party.packed_graph(trace(network)), graph)
    torch.save(network.state_dict(), weights)
    torch.save(x, pixels)
    common = [f"--graph={graph}", "--provider=TTP"]

    def run(asked, victim=None, after=0.0):
        """Whether it came to its end."""
        port = free_port("127.0.0.1")
        killer = Killer(port, victim, after) if victim else None
        try:
            launch.run_parties(asked, "tuned", "127.0.0.1", port, 60, tmp_path)
            return True
        except private.PrivateInferenceError:
            return False
        finally:
            if killer is not None:
                killer.over.set()
                killer.join()

    def filling(name, queries):
        more = [*common, f"--fill={queries}"]
        return {
            "server": [*more, f"--weights={weights}", f"--reserve={tmp_path / name / 'server'}"],
            "client": [*more, "--shape=1,1,8,8", f"--reserve={tmp_path / name / 'client'}"],
            "dealer": ["--provider=TTP"],
        }

    # Whoever is killed while they fill: not both have what could be drawn from, unless both had come to their end.
    begin = time.monotonic()
    assert run(filling("whole", 400))
    took = time.monotonic() - begin
    for i in range(20):
        name = f"fill {i}"
        if not run(filling(name, 400), ("dealer", "server", "client")[i % 3], random.random() * took):
            folders = [tmp_path / name / role for role in ("server", "client")]
            sealed = all((folder / "reserve.json").exists() for folder in folders)
            assert not sealed or [len(list(folder.glob("*.key"))) for folder in folders] == [400, 400], name

    # 40 runs of up to 8 queries, each killed somewhere.
    drawn = {role: tmp_path / "whole" / role / "drawn" for role in ("server", "client")}
    drawing = {
        "server": [*common, f"--weights={weights}", f"--reserve={tmp_path / 'whole' / 'server'}"],
        "client": [*common, f"--images={pixels}", f"--reserve={tmp_path / 'whole' / 'client'}"],
    }
    begin = time.monotonic()
    first = {role: [*words, "--batch=1"] for role, words in drawing.items()}
    first["client"] = first["client"] + [f"--result={tmp_path / 'result.pt'}"]
    assert run(first)
    took = time.monotonic() - begin
    ended_well = 0
    for i in range(40):
        asked = {
            role: [*words, "--batch=1", f"--audit={tmp_path / f'{role}.{i}.pt'}"] for role, words in drawing.items()
        }
        asked["client"] += [f"--result={tmp_path / f'{i}.pt'}"]
        ended_well += run(asked, ("server", "client")[i % 2], random.random() * took)
        if (tmp_path / f"{i}.pt").exists():  # what came out before the kill is right
            logits = torch.load(tmp_path / f"{i}.pt")["logits"]
            torch.testing.assert_close(logits, clear[: len(logits)], atol=0.05, rtol=0)
    logs = {role: [int(line) for line in path.read_text().split()] for role, path in drawn.items()}
    for role, log in logs.items():
        assert log == sorted(set(log)), role  # none twice
        with opened(drawn[role].parent):
            pass  # what a killed party had not erased yet is erased by the next
        left = {int(file.stem) for file in drawn[role].parent.glob("*.key")}
        assert not left & set(log) and min(left) == log[-1] + 1, role
    assert ended_well < 40 and len(set(logs["server"]) & set(logs["client"])) > 20
    assert json.loads((drawn["server"].parent / "reserve.json").read_text())["queries"] == 400

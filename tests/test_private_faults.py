"""What goes wrong while parties run: each fault is one error that says so, no process stays and nothing is recorded."""

import contextlib
import itertools
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from textwrap import indent

import psutil
import pytest
import torch
from test_private_launch import TINY, files, free_port

from salvit_core import CCT, preset, private, records
from salvit_core.private import latency, launch, nursery

NUMBER = {"server": 0, "client": 1, "dealer": 2}


def parties(port):
    """The processes of this machine that met at a port, by role."""
    found = {}
    for process in psutil.process_iter(["name"]):
        role, _, met = process.info["name"].partition(":")
        if met == str(port):
            found[role] = process
    return found


def spent(process):
    """CPU seconds of a process, or None if it has ended."""
    try:
        return sum(process.cpu_times()[:2])
    except psutil.Error:
        return None


class Watch(threading.Thread):
    """Follows the parties that meet at a port, and kills one once it has spent some CPU seconds.

    CPU time, not time: a loaded machine should not move the moment.
    """

    def __init__(self, port, victim=None, after=0.0):
        super().__init__()
        self.port, self.victim, self.after = port, victim, after
        self.spent, self.killed, self.ended = {}, None, threading.Event()

    def run(self):
        found = {}
        while not self.ended.is_set() and self.killed is None:
            found = found if self.victim in found else parties(self.port)
            for role, process in found.items():
                self.spent[role] = max(self.spent.get(role, 0.0), spent(process) or 0.0)
            if self.victim in found and self.spent[self.victim] >= self.after:
                with contextlib.suppress(psutil.NoSuchProcess):  # it came too late
                    found[self.victim].kill()
                    self.killed = time.monotonic()
            time.sleep(0.02)


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Makes a record of one private inference while a `Watch` looks on; records go to an empty folder."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    here = threading.local()

    def infer(*args, **options):
        return private.infer(*args, **{**options, "timeout": 120, "meet": f"127.0.0.1:{here.port}"})

    monkeypatch.setattr(latency, "infer", infer)

    def make(query, provider, *kill):
        here.port = free_port("127.0.0.1")
        watch = Watch(here.port, *kill)
        watch.start()
        try:
            run = latency.LatencyRun(TINY, query, "tuned", provider)
            return watch, records.ensure("latency", run, latency.measure), None
        except private.PrivateInferenceError as error:
            return watch, None, (str(error), time.monotonic())
        finally:
            watch.ended.set()
            watch.join()

    return make


def test_a_party_killed_at_any_moment(record, tmp_path):
    """Twenty kills, spread over all that a party does from its start to its last message."""
    watch, kept, error = record(0, "TTP")
    assert error is None and kept["metrics"]["faithful"]
    written = {tmp_path / "data" / "runs" / "latency" / f"{kept['key']}.json"}
    assert set(tmp_path.rglob("*.*")) == written
    queries = itertools.count(1)  # one of its own for every try: what is on record is not run again

    def strike(i):
        victim = ("server", "client", "server", "client", "dealer")[i % 5]
        share = (i + random.random()) / 20 * 0.95
        for _ in range(10):  # until the kill comes before the end, or before the dealer has dealt all
            provider = "TTP" if victim == "dealer" else "TFP"
            seen, kept, error = record(next(queries), provider, victim, share * watch.spent[victim])
            if error is not None or (seen.killed is not None and victim != "dealer"):
                return victim, share, seen, kept, error
            assert kept["metrics"]["faithful"]
            written.add(tmp_path / "data" / "runs" / "latency" / f"{kept['key']}.json")
            share *= 0.8
        pytest.fail(f"{victim} was never caught before its end")

    with ThreadPoolExecutor(2) as two:
        for victim, share, seen, kept, error in two.map(strike, range(20)):
            case = f"{victim} killed at {share:.2f} of its time: {error}"
            assert kept is None and error is not None and seen.killed is not None, case
            message, raised = error
            assert f"party {NUMBER[victim]} ({victim}) was killed by signal 9" in message, case
            assert "\n" not in message and message.count("was killed by") == 1, case
            assert raised - seen.killed < 10, case
            assert not parties(seen.port), case
    # What the runs that ended well recorded is all there is.
    assert set(tmp_path.rglob("*.*")) == written


def inside(monkeypatch, folder, role, code):
    """Have a party's process run some code before all else: what goes wrong inside of it."""
    folder.mkdir()
    hook = f"import os, sys\ndef fault():\n    if {role!r} in sys.argv:\n" + indent(code, "        ")
    (folder / "sitecustomize.py").write_text(hook + "\nos.register_at_fork(after_in_child=fault)\n")
    monkeypatch.setattr(nursery, "_here", None)  # one of its own, which reads this
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


# A thread that waits for a connection besides the one to the place where they met, and ends them all.
CUT = """
import threading

def cut():
    import os, socket, time
    import psutil
    place = int(next(word for word in sys.argv if word.startswith("--meet=")).rpartition(":")[2])

    def peers():
        found = [c for c in psutil.Process().net_connections("tcp") if c.status == "ESTABLISHED"]
        return [c for c in found if place not in (c.laddr.port, c.raddr.port)]

    while not peers():
        time.sleep(0.05)
    time.sleep(1)
    for connection in peers():
        socket.socket(fileno=os.dup(connection.fd)).shutdown(socket.SHUT_RDWR)
    with open({path!r}, "w") as file:
        print(time.monotonic(), file=file)

threading.Thread(target=cut, daemon=True).start()
"""


@pytest.mark.parametrize("protocol", ["stock", "tuned"])
def test_a_lost_connection(monkeypatch, tmp_path, protocol):
    inside(monkeypatch, tmp_path / "site", "server", CUT.format(path=str(tmp_path / "cut")))
    with pytest.raises(private.PrivateInferenceError, match="lost the connection to the other party") as caught:
        private.infer(CCT(preset("cct_7_3x1")), torch.zeros(8, 3, 32, 32), protocol, timeout=100)
    assert time.monotonic() - float((tmp_path / "cut").read_text()) < 10 and "\n" not in str(caught.value)


def test_peers_of_other_versions(monkeypatch, tmp_path):
    inside(monkeypatch, tmp_path / "site", "client", "import salvit_core.private.party as p\np.__version__ = '0.0.1'\n")
    options = {role: [*words, "--protocol=tuned"] for role, words in files(tmp_path).items()}
    with pytest.raises(private.PrivateInferenceError) as caught:
        launch.run_parties(options, "127.0.0.1", 0, 60, tmp_path)
    said = str(caught.value).split("; party")
    assert len(said) == 2
    assert all("ended with status 1: the parties do not agree: version: " in words for words in said), said


def test_peers_of_other_bits(tmp_path):
    options = {role: [*words, "--protocol=tuned"] for role, words in files(tmp_path).items()}
    options["server"] += ["--bits=10", "--batch=1"]
    options["client"] += ["--bits=16", "--batch=1", "--check"]
    with pytest.raises(private.PrivateInferenceError) as caught:
        launch.run_parties(options, "127.0.0.1", 0, 60, tmp_path)
    said = str(caught.value).split("; party")
    assert len(said) == 2
    for words in said:
        assert "do not agree: bits: " in words and "; check: " in words and "batch" not in words, said


def test_peers_of_which_one_has_the_defaults(tmp_path):
    options = {role: [*words, "--protocol=tuned"] for role, words in files(tmp_path).items()}
    options["server"] += ["--bits=10", "--batch=1"]
    begin = time.monotonic()
    with pytest.raises(private.PrivateInferenceError) as caught:
        launch.run_parties(options, "127.0.0.1", 0, 60, tmp_path)
    assert time.monotonic() - begin < 20  # the nursery's start included
    said = str(caught.value)
    assert "bits: client has 13, server has 10; batch: client has all, server has 1" in said


# Notes the first number that the party would draw, when all that comes before is done.
DRAW = """
import salvit_core.private.party as party
import torch

def noted(before=party.main):
    with open({path!r}, "a") as file:
        print(int(torch.randint(-(2**62), 2**62, ())), file=file)
    before()

party.main = noted
"""


def test_every_session_has_randomness_of_its_own(monkeypatch, tmp_path):
    """CrypTen's dealer draws its keys from torch's generator, which a fork has from the nursery."""
    inside(monkeypatch, tmp_path / "site", "server", DRAW.format(path=str(tmp_path / "drawn")))
    network, images = CCT(preset("cct_2_3x1")), torch.zeros(1, 1, 8, 8)
    for _ in range(2):
        private.infer(network, images, "tuned")
    assert len(set((tmp_path / "drawn").read_text().split())) == 2


def test_no_room_for_the_result(monkeypatch, tmp_path):
    """A file may grow to 4 KiB: less than the client has to write."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
    inside(monkeypatch, tmp_path / "site", "client", limit)
    options = {role: [*words, "--protocol=tuned"] for role, words in files(tmp_path).items()}
    with pytest.raises(private.PrivateInferenceError) as caught:
        launch.run_parties(options, "127.0.0.1", 0, 60, tmp_path)
    said = str(caught.value)
    assert "party 1 (client)" in said and "result.pt (File too large): make room" in said and "\n" not in said
    assert not list((tmp_path / "client").glob("result*"))


def test_two_studies_at_once():
    networks = []
    for seed, method in enumerate(("SA softmax", "SAL-ViT B=1")):
        torch.manual_seed(seed)
        networks.append((CCT(preset("cct_2_3x1", method)), torch.randn(2, 1, 8, 8)))
        torch.nn.init.normal_(networks[-1][0].head.weight)
    with ThreadPoolExecutor(2) as two:
        results = list(two.map(lambda pair: private.infer(*pair, "tuned"), networks))
    for (network, pictures), result in zip(networks, results, strict=True):
        with torch.no_grad():
            clear = network.eval()(pictures)
        assert result.faithful and (result.logits - clear).abs().max() < 0.01
    assert (results[0].logits - results[1].logits).abs().max() > 0.1

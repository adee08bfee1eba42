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
from test_private_tuned import DOMAINS
from torch import nn
from zoo import Zoo

from salvit_core import CCT, preset, private, workspace
from salvit_core.experiments import execute, store
from salvit_core.experiments.runs import PrivateRun, run_of
from salvit_core.models import operations
from salvit_core.models.activations import LearnedQuad, Quad
from salvit_core.private.parties import forks, launch

pytestmark = pytest.mark.processes

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


def right(metrics):
    return not metrics["violations"] and metrics["logit_error"] < 0.05


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
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    here = threading.local()

    original = launch.infer

    def infer(*args, **options):
        return original(*args, **{**options, "timeout": 120, "meet": f"127.0.0.1:{here.port}"})

    monkeypatch.setattr(launch, "infer", infer)

    def make(query, provider, *kill):
        here.port = free_port("127.0.0.1")
        watch = Watch(here.port, *kill)
        watch.start()
        try:
            return watch, execute.ensure(PrivateRun(TINY, "tuned", provider, query)), None
        except private.PrivateInferenceError as error:
            return watch, None, (str(error), time.monotonic())
        finally:
            watch.ended.set()
            watch.join()

    return make


def test_a_party_killed_at_any_moment(record, tmp_path):
    """Twenty kills, spread over all that a party does from its start to its last message."""

    def path_of(kept):
        return store.path(run_of(kept))

    def records():
        return {path for path in tmp_path.rglob("*.*") if ".locks" not in path.parts}

    watch, kept, error = record(0, "TTP")
    assert error is None and right(kept["metrics"])
    written = {path_of(kept)}
    assert records() == written
    queries = itertools.count(1)  # one of its own for every try: what is on record is not run again

    def strike(i):
        victim = ("server", "client", "server", "client", "dealer")[i % 5]
        share = (i + random.random()) / 20 * 0.95
        for _ in range(10):  # until the kill comes before its last message
            provider = "TTP" if victim == "dealer" else "TFP"
            seen, kept, error = record(next(queries), provider, victim, share * watch.spent[victim])
            if error is not None:
                return victim, share, seen, kept, error
            # A run that a kill did not end had all it needed from the one who was killed, and is as right as any.
            assert right(kept["metrics"]) and not parties(seen.port)
            written.add(path_of(kept))
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
    assert records() == written


def inside(monkeypatch, folder, role, code):
    """Have a party's process run some code before all else: what goes wrong inside of it."""
    folder.mkdir()
    # threading first: what it does after a fork, it does before the fault, which may start a thread.
    hook = f"import os, sys, threading\ndef fault():\n    if {role!r} in sys.argv:\n" + indent(code, "        ")
    (folder / "sitecustomize.py").write_text(hook + "\nos.register_at_fork(after_in_child=fault)\n")
    monkeypatch.setattr(forks, "_here", None)  # one of its own, which reads this
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
    found = peers()
    with open({path!r}, "w") as file:  # first: this process ends as soon as it sees the loss
        print(time.monotonic(), file=file)
    for connection in found:
        socket.socket(fileno=os.dup(connection.fd)).shutdown(socket.SHUT_RDWR)

threading.Thread(target=cut, daemon=True).start()
"""


@pytest.mark.parametrize("protocol", ["stock", "tuned"])
def test_a_lost_connection(monkeypatch, tmp_path, protocol):
    inside(monkeypatch, tmp_path / "site", "server", CUT.format(path=str(tmp_path / "cut")))
    with pytest.raises(private.PrivateInferenceError, match="lost the connection to the other party") as caught:
        private.infer(CCT(preset("cct_7_3x1")), torch.zeros(8, 3, 32, 32), protocol, timeout=100)
    assert time.monotonic() - float((tmp_path / "cut").read_text()) < 10 and "\n" not in str(caught.value)


# Adds to one number of what an operation gives, as a truncation of 20 bits does when it fails, or a value far outside.
SPOIL = """
import salvit_core.private.tuned.protocol as tuned

def spoiled(self, value, before=tuned.Tuned.watch):
    if tuned.session.place.startswith("blocks.") and not tuned.session.recording:
        value.data[(0,) * value.data.dim()] += {amount}
    before(self, value)

tuned.Tuned.watch = spoiled
"""


def test_a_failure_at_any_operation_is_found_and_named(monkeypatch, tmp_path):
    linear = [nn.Linear(16, 4), nn.Conv2d(1, 2, 3), Quad(), LearnedQuad(8), operations.SquaredNorm(), nn.Dropout()]
    shapes = [(4, 16), (1, 6, 6), (2, 8), (2, 8), (4, 8), (9,)]
    kinds = linear + [operation for operation, _, _ in DOMAINS.values()]
    zoo = Zoo(kinds, shapes + [x.shape for _, x, _ in DOMAINS.values()], [0.2] * len(kinds), [0.5] * len(kinds))

    def seen():
        found = private.infer(zoo, zoo.images(), "tuned", check=True).violations
        return {line.split(":")[0] for line in found if "seen on shares" in line}

    assert not seen()
    for i, amount in enumerate(("1 << 64 - 13", "1 << 64 - 20", "round(70_000 * 2.0**value.bits)")):
        inside(monkeypatch, tmp_path / f"site{i}", "server", SPOIL.format(amount=amount))
        assert seen() >= {f"blocks.{i}" for i in range(len(kinds))}, amount


def test_peers_of_other_versions(monkeypatch, tmp_path):
    inside(
        monkeypatch,
        tmp_path / "site",
        "client",
        "import salvit_core.private.parties.party as p\np.__version__ = '0.0.1'\n",
    )
    options = files(tmp_path)
    with pytest.raises(private.PrivateInferenceError) as caught:
        launch.run_parties(options, "tuned", "127.0.0.1", 0, 60, tmp_path)
    said = str(caught.value).split("; party")
    assert len(said) == 2
    assert all("ended with status 1: the parties do not agree: version: " in words for words in said), said


def test_peers_of_other_bits(tmp_path):
    options = files(tmp_path)
    options["server"] += ["--bits=10", "--batch=1"]
    options["client"] += ["--bits=16", "--batch=1", "--check"]
    with pytest.raises(private.PrivateInferenceError) as caught:
        launch.run_parties(options, "tuned", "127.0.0.1", 0, 60, tmp_path)
    said = str(caught.value).split("; party")
    assert len(said) == 2
    for words in said:
        assert "do not agree: bits: " in words and "; check: " in words and "batch" not in words, said


def test_peers_of_which_one_has_the_defaults(tmp_path):
    options = files(tmp_path)
    options["server"] += ["--bits=10", "--batch=1"]
    begin = time.monotonic()
    with pytest.raises(private.PrivateInferenceError) as caught:
        launch.run_parties(options, "tuned", "127.0.0.1", 0, 60, tmp_path)
    assert time.monotonic() - begin < 20  # the nursery's start included
    said = str(caught.value)
    assert "bits: client has 13, server has 10; batch: client has all, server has 1" in said


# Notes the first number that the party would draw, when all that comes before is done.
DRAW = """
import salvit_core.private.parties.party as party
import torch

def noted(before=party.main, **options):
    with open({path!r}, "a") as file:
        print(int(torch.randint(-(2**62), 2**62, ())), file=file)
    before(**options)

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
    options = files(tmp_path)
    with pytest.raises(private.PrivateInferenceError) as caught:
        launch.run_parties(options, "tuned", "127.0.0.1", 0, 60, tmp_path)
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
        assert not result.violations and (result.logits - clear).abs().max() < 0.01
    assert (results[0].logits - results[1].logits).abs().max() > 0.1

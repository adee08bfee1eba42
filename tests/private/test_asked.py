"""What is asked of a private run is looked at before anything meets; every wrong value gets one line that names it."""

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from copy import deepcopy

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_private_faults import inside
from test_private_launch import PARTY, files, free_port, images, model, parties_alive
from torch import nn

from salvit_core import private
from salvit_core.private import asked
from salvit_core.private.asked import Asked
from salvit_core.private.parties import launch, party


def refused(*args, **kwargs):
    pytest.fail("the parties were started")


@pytest.fixture
def nobody(monkeypatch):
    monkeypatch.setattr(launch, "run_parties", refused)


def hooked(register):
    network = model()
    getattr(network.blocks[0], register)(lambda *_: None)
    return network


def with_weight(name, value):
    network = model()
    network.state_dict()[name].view(-1)[0] = value
    return network


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model=None), "model is NoneType: give a torch.nn.Module"),
        (dict(model=hooked("register_forward_hook")), "model has hooks on blocks.0, which would not run on shares"),
        (dict(model=hooked("register_forward_pre_hook")), "model has hooks on blocks.0, which would not run on shares"),
        (dict(model=with_weight("head.bias", 1e30)), "weights head.bias reach 1e.30: fixed point needs values within"),
        (dict(model=with_weight("head.weight", -1e12)), "weights head.weight reach 1e.12"),
        (dict(model=with_weight("head.bias", float("inf"))), "weights head.bias hold NaN or infinite values"),
        (dict(images=images().to_sparse()), "images are sparse_coo: give a dense tensor"),
        (dict(images=images().to("meta")), "images are on the meta device: give a dense tensor"),
        (dict(images=torch.zeros(1, 1, 4, 16)), r"images have shape \(1, 1, 4, 16\): this network reads"),
        (dict(link="LAN"), "link is 'LAN': give a Link"),
        (dict(timeout=float("inf")), "timeout is inf: give a finite number"),
        (dict(timeout=float("nan")), "timeout is nan: give a finite number"),
        (dict(timeout="10"), "timeout is '10': give a finite number"),
        (dict(timeout=2.1e6), "timeout is 2100000.0: give at most 2000000.0"),
        (dict(bits="13"), "bits is '13': give a whole number, or None"),
        (dict(bits=13.5), "bits is 13.5: give a whole number, or None"),
        (dict(bits=40), "bits is 40: give 8 to 22, or None"),
        (dict(batch=1.5), "batch is 1.5: give a whole number, or None"),
        (dict(batch=0), "batch is 0: give 1 or more, or None"),
        (dict(meet=5), "meet is 5: give HOST:PORT"),
        (dict(meet="127.0.0.1:99999"), "meet is '127.0.0.1:99999': give HOST:PORT"),
        (dict(check="yes"), "check is 'yes': give True or False"),
        (dict(protocol="stock", check=True), "protocol 'stock' knows no check: choose tuned"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_meets(nobody, changes, message):
    arguments = {"model": model(), "images": images(), "protocol": "tuned", **changes}
    with pytest.raises(ValueError, match=message) as found:
        private.infer(arguments.pop("model"), arguments.pop("images"), **arguments)
    assert "\n" not in str(found.value)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(Asked.__dataclass_fields__)), ANYTHING)
def test_any_value_is_taken_or_refused_in_one_line(name, value):
    try:
        found = getattr(Asked(**{name: value}), name)
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)
        return
    good = {
        "timeout": lambda x: 0 < x <= 2e6,
        "bits": lambda x: x is None or 8 <= x <= 22,
        "batch": lambda x: x is None or x >= 1,
        "check": lambda x: x in (True, False),
        "drift": lambda x: x in (True, False),
        "device": lambda x: x == "cpu" or x.startswith("cuda"),
        "protocol": lambda x: x in ("stock", "tuned"),
        "provider": lambda x: x in ("TFP", "TTP"),
        "reveal": lambda x: x in ("logits", "label"),
        "dealt": lambda x: x in ("along", "ahead"),
    }
    assert good[name](found)


def test_numbers_of_numpy_are_numbers():
    found = Asked(bits=np.int64(12), batch=np.int32(4), timeout=np.float32(2))
    assert (found.bits, found.batch, found.timeout) == (12, 4, 2.0)


@pytest.mark.parametrize(
    "number, batch, size", [(2, 64, 2), (2, 10**6, 2), (100, 64, 50), (9, 4, 3), (8, 4, 4), (7, None, 7)]
)
def test_a_small_query_is_not_filled_up_to_a_large_one(number, batch, size):
    assert asked.query_size(number, batch) == size
    filled = -(-number // size) * size - number
    assert filled < -(-number // size)


def test_what_cannot_fit_in_memory_is_refused(nobody, monkeypatch):
    monkeypatch.setattr(asked.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**8}))
    with pytest.raises(ValueError, match=r"batch is None: a query would take about \d+.\d GB and 0.1 GB are free"):
        private.infer(model(), torch.zeros(300, 1, 8, 8), "tuned")


class Stubborn(nn.Module):
    """Its trace is another network: what a Python `if` on the mode chose is fixed in it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def forward(self, x):
        x = self.linear(x.flatten(1))
        return x if isinstance(x, torch.fx.Proxy) else x + 1


@pytest.mark.processes
def test_an_answer_is_judged_by_the_model_itself():
    torch.manual_seed(0)
    result = private.infer(Stubborn(), images(), "tuned")
    assert not result.faithful and result.error == pytest.approx(1, abs=0.01)


@pytest.mark.processes
def test_a_network_in_double_and_images_with_a_gradient():
    network = model().double()
    before = deepcopy(network.state_dict())
    result = private.infer(network, images().double().requires_grad_(), "tuned", batch=10**6)
    assert result.error < 0.05
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_infer_in_a_fork_of_a_process_that_inferred():
    code = (
        "import os, torch\nfrom salvit_core import CCT, preset, private\n"
        "m = CCT(preset('cct_2_3x1', 'SA L2Q', layers=1)); x = torch.zeros(1, 1, 8, 8)\n"
        "print(private.infer(m, x, 'tuned', timeout=100).error < 0.05, flush=True)\n"
        "child = os.fork()\n"
        "print(private.infer(m, x, 'tuned', timeout=100).error < 0.05, flush=True)\n"
        "if child == 0: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["True"] * 3, done.stderr


# Parties


def said(role, words, folder, timeout=60):
    """What a party says as it ends, one line, and how long that took."""
    begin = time.monotonic()
    done = subprocess.run([*PARTY, role, *words], capture_output=True, text=True, cwd=folder, timeout=timeout)
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    return lines[-1], time.monotonic() - begin


def alone(folder, role, **changes):
    """A party's words, to a port where nobody is; `changes` of its options."""
    words = [word for word in files(folder)[role] if word.partition("=")[0][2:] not in changes]
    port = free_port("127.0.0.1")
    common = [f"--meet=127.0.0.1:{port}", "--protocol=tuned"]
    return common + words + [f"--{name}={value}" for name, value in changes.items()]


@pytest.mark.parametrize(
    "role, changes, message",
    [
        ("client", {"bits": 0}, "bits is 0: give 8 to 22, or None"),
        ("client", {"bits": 40}, "bits is 40: give 8 to 22, or None"),
        ("server", {"timeout": "nan"}, "timeout is nan: give a finite number"),
        ("server", {"timeout": "-1"}, "timeout is -1.0: give a positive number"),
        ("server", {"batch": 0}, "batch is 0: give 1 or more, or None"),
        ("client", {"meet": "127.0.0.1:99999"}, "expected HOST:PORT"),
        ("client", {"device": "tpu"}, "device is 'tpu': torch has none here"),
    ],
)
def test_a_party_refuses_bad_options(capsys, tmp_path, role, changes, message):
    with pytest.raises(SystemExit):
        party.main([role, *alone(tmp_path, role, **changes)])
    assert message in capsys.readouterr().err


def write(path, what):
    path.write_bytes(what) if isinstance(what, bytes) else torch.save(what, path)
    return path


@pytest.mark.parametrize(
    "role, option, what, message",
    [
        ("server", "weights", b"", "bad does not hold a state dict that torch.save wrote"),
        ("server", "weights", b"\x80\x04N.", "bad does not hold a state dict that torch.save wrote"),
        ("server", "weights", {"head.weight": torch.zeros(1)}, "the weights in bad do not fit the architecture"),
        ("server", "weights", torch.zeros(3), "the weights in bad do not fit the architecture"),
        ("client", "images", b"", "bad does not hold a tensor of images that torch.save wrote"),
        ("client", "images", [1.0], "images are list: give a float32 tensor"),
        ("client", "images", torch.zeros(1, 3, 8, 8), r"images have shape \(1, 3, 8, 8\): this network reads"),
        ("client", "images", torch.zeros(1, 1, 16, 16), r"images have shape \(1, 1, 16, 16\): this network reads"),
        ("client", "architecture", b"{", "bad is no configuration of a network in JSON"),
        ("client", "architecture", b"[1]", "bad is no configuration of a network in JSON"),
        ("client", "architecture", b'{"preset": "x"}', "bad is no configuration of a network in JSON"),
    ],
)
def test_a_party_refuses_bad_files_before_it_meets_anybody(tmp_path, role, option, what, message):
    words = alone(tmp_path, role, **{option: write(tmp_path / "bad", what)})
    with pytest.raises(SystemExit, match=message):
        party.main([role, *words])


@pytest.mark.parametrize("role, option", [("client", "result"), ("server", "drift"), ("client", "audit")])
@pytest.mark.parametrize("what", ["a link", "a FIFO", "a folder"])
def test_a_party_replaces_nothing_and_says_so_before_it_meets_anybody(tmp_path, role, option, what):
    place = tmp_path / "theirs"
    make = {"a link": lambda path: path.symlink_to("nowhere"), "a FIFO": os.mkfifo, "a folder": os.mkdir}[what]
    make(place)
    before = place.lstat()
    message = f"party . .{role}.: cannot write .*theirs: it is {what}, no plain file; name another file"
    with pytest.raises(SystemExit, match=message):
        party.main([role, *alone(tmp_path, role, timeout=5, **{option: place})])
    assert place.lstat() == before


def test_a_party_does_not_wait_for_a_fifo_that_nobody_fills(tmp_path):
    os.mkfifo(tmp_path / "weights")
    with pytest.raises(SystemExit, match="cannot read .*weights .it is no plain file.: mend that"):
        party.main(["server", *alone(tmp_path, "server", timeout=5, weights=tmp_path / "weights")])


def test_a_server_refuses_weights_that_are_not_finite(tmp_path):
    words = alone(tmp_path, "server")
    path = next(word.partition("=")[2] for word in words if word.startswith("--weights="))
    weights = torch.load(path)
    weights["head.bias"][0] = float("nan")
    torch.save(weights, path)
    with pytest.raises(SystemExit, match="weights head.bias hold NaN or infinite values"):
        party.main(["server", *words])


@pytest.mark.processes
def test_a_client_without_a_server_says_so(tmp_path):
    words = alone(tmp_path, "client", timeout=6)
    line, seconds = said("client", words, tmp_path)
    assert "no server answered at 127.0.0.1:" in line and line.endswith("start it first")
    assert seconds < 50


@pytest.mark.processes
def test_a_second_client_ends_with_its_time_and_the_first_is_served(tmp_path):
    """It comes when the server has met the first, whose name it has, too, and listens no more."""
    options, port = files(tmp_path), free_port("127.0.0.1")
    common = [f"--meet=127.0.0.1:{port}", "--protocol=tuned"]

    def started(role, *words, timeout=60):
        command = [*PARTY, role, *common, *options[role], *words, f"--timeout={timeout}"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def listening():
        with contextlib.suppress(psutil.Error):
            return any(each.status == "LISTEN" for each in psutil.Process(server.pid).net_connections("tcp"))

    server = started("server")
    while not listening():
        assert server.poll() is None
        time.sleep(0.02)
    first = started("client")
    while listening():
        time.sleep(0.02)
    second = started("client", f"--result={tmp_path / 'second.pt'}", timeout=5)
    ended = {process: process.communicate(timeout=120)[1] for process in (server, first, second)}
    assert server.returncode == 0, ended[server]
    assert sorted([first.returncode == 0, second.returncode == 0]) == [False, True]
    left = ended[second].strip().splitlines()[-1]
    assert left.startswith("party 1 (client): ") and "server" in left
    assert (tmp_path / "client" / "result.pt").exists() and not (tmp_path / "second.pt").exists()


def met(port):
    """The store of a server of stock, as soon as it listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)


@pytest.mark.processes
@pytest.mark.parametrize(
    "terms, said",
    [
        ([1], "the client sent no terms: it must be of this version"),
        ({}, "the client's images have shape None: four positive numbers were expected"),
        ({"shape": [1, 1, 8, -8]}, "the client's images have shape [1, 1, 8, -8]: four positive numbers were expected"),
    ],
)
def test_terms_that_are_none_are_refused(tmp_path, terms, said):
    """A stranger at stock's store, who says nothing that a party says."""
    port, options = free_port("127.0.0.1"), files(tmp_path)
    command = [*PARTY, "server", f"--meet=127.0.0.1:{port}", "--protocol=stock", "--timeout=60", *options["server"]]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    store = met(port)
    store.set("client", json.dumps(terms))
    store.set("client has read", "")
    begin = time.monotonic()
    _, errors = server.communicate(timeout=90)
    assert server.returncode == 1 and "Traceback" not in errors and time.monotonic() - begin < 30
    assert errors.strip().splitlines()[-1] == f"party 0 (server): {said}"


# Joins gloo only once a stranger has been at all ports of its peer's.
LATE = """
import torch.distributed as dist

def late(*words, before=dist.init_process_group, **options):
    import time
    time.sleep(1.5)
    before(*words, **options)

dist.init_process_group = late
"""


@pytest.mark.processes
def test_garbage_at_gloos_ports_changes_no_answer(monkeypatch, tmp_path):
    """From the moment they listen: of every length, with and without a number that gloo might wait for."""
    inside(monkeypatch, tmp_path / "site", "client", LATE)
    port, over, held, disturbed = free_port("127.0.0.1"), threading.Event(), [], set()

    def disturb():
        while not over.wait(0.02):
            for process in parties_alive():
                with contextlib.suppress(OSError, psutil.Error):
                    listening = [c.laddr for c in process.net_connections("tcp") if c.status == "LISTEN"]
                    for place in {place for place in listening if place.port != port} - disturbed:
                        disturbed.add(place)
                        for number in range(8):
                            held.append(socket.create_connection(place, timeout=2))
                            held[-1].sendall((number.to_bytes(8, "little") + b"\xff" * 4000)[: 1 << (2 * number)])

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        result = private.infer(model(), images(), "stock", timeout=60, meet=f"127.0.0.1:{port}")
    finally:
        over.set()
        thread.join()
        for connection in held:
            connection.close()
    assert result.error < 0.05 and len(disturbed) > 1


@pytest.mark.processes
def test_a_peer_that_met_and_falls_silent_is_waited_for_until_the_time_is_over(tmp_path):
    """A stranger who says what the client would say, and never joins."""
    port, options = free_port("127.0.0.1"), files(tmp_path)
    words = [f"--meet=127.0.0.1:{port}", "--protocol=stock", "--timeout=12", *options["server"]]
    begin = time.monotonic()
    server = subprocess.Popen([*PARTY, "server", *words], stderr=subprocess.PIPE, text=True)
    store = met(port)
    store.wait(["server"])
    terms = json.loads(store.get("server")) | {"shape": [1, 1, 8, 8]}
    store.set("client", json.dumps(terms))
    store.set("client has read", "")
    _, errors = server.communicate(timeout=60)
    assert server.returncode == 3 and time.monotonic() - begin < 12 + 2 + 10  # what an import may take
    line = errors.strip().splitlines()[-1]
    assert line.startswith("party 0 (server): not done after 12 s: ") and "Traceback" not in errors


@pytest.mark.processes
def test_a_full_disk_is_named(monkeypatch, tmp_path):
    """The launcher writes weights, images and graph for the parties to read."""

    def full(self, what):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launch.Path, "write_bytes", full)
    message = r"cannot write .*weights.pt \(No space left on device\): set TMPDIR to a folder with room"
    with pytest.raises(private.PrivateInferenceError, match=message):
        private.infer(model(), images(), "tuned")


# What a party on a full disk is left with: it writes nothing, not even why.
NO_ROOM = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))\n"


@pytest.mark.processes
@pytest.mark.parametrize("full", [True, False])
def test_parties_that_could_not_even_say_why_are_spoken_for(monkeypatch, tmp_path, full):
    inside(monkeypatch, tmp_path / "site", "client", NO_ROOM)
    original = launch.tempfile.TemporaryFile

    def trial(**options):
        if full and "dir" in options:
            raise OSError(28, "No space left on device")
        return original(**options)

    monkeypatch.setattr(launch.tempfile, "TemporaryFile", trial)
    with pytest.raises(private.PrivateInferenceError) as caught:
        private.infer(model(), images(), "tuned")
    said = r": \(said nothing: cannot write .*salvit-\w+ \(No space left on device\), set TMPDIR to a folder with room"
    assert re.search(said if full else r": \(said nothing\)", str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


FULL = """
import torch
from salvit_core import CCT, preset, private
try:
    private.infer(CCT(preset("cct_2_3x1", "SA L2Q")), torch.zeros(4, 1, 8, 8), "tuned", batch=1)
except private.PrivateInferenceError as error:
    print(error)
"""
DISK = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size="$0"k tmpfs "$TMPDIR" && "$@" && ls -A "$TMPDIR"']


@pytest.mark.processes
@pytest.mark.parametrize("kilobytes", [12, 100, 148])  # without room for the weights, the graph, the result
def test_a_disk_that_is_really_full(tmp_path, kilobytes):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    if subprocess.run([*DISK, "8", "true"], env=environment, capture_output=True).returncode:
        pytest.skip("no disk of its own can be had here")
    command = [*DISK, str(kilobytes), sys.executable, "-c", FULL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1 and not done.stderr  # nor is anything left
    assert re.search(r"cannot write .*salvit-.* .No space left on device.(: set TMPDIR|: make room|, set)", done.stdout)


@pytest.mark.parametrize("what", ["server", "client.log"])
def test_a_disk_without_room_for_a_file_is_named(monkeypatch, tmp_path, what):
    """Of names alone a disk may have no more."""

    def full(path, *words, before, **options):
        if path.name == what:
            raise OSError(28, "No space left on device")
        return before(path, *words, **options)

    for name in ("mkdir", "touch"):
        before = getattr(launch.Path, name)
        monkeypatch.setattr(launch.Path, name, functools.partialmethod(full, before=before))
    monkeypatch.setattr(launch, "guard", lambda *_: None)
    monkeypatch.setattr(launch, "bear", lambda words, *_: Stopped() if words[0] != what else pytest.fail("it began"))
    with pytest.raises(private.PrivateInferenceError, match="cannot write .*No space left on device.: set TMPDIR to a"):
        private.infer(model(), images(), "tuned")


class Stopped:
    """A party that has ended."""

    def poll(self):
        return 0

    wait = close = poll


@pytest.mark.processes
def test_partial_results_say_that_they_are(tmp_path):
    seen = []
    private.infer(model(), torch.zeros(3, 1, 8, 8), "tuned", batch=1, progress=seen.append)
    assert seen and all(found["images"] == 3 for found in seen)
    assert [found["complete"] for found in seen] == [
        len(found["logits"]) == 3 and "violations" in found for found in seen
    ]

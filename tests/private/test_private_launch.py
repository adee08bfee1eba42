"""What can go wrong around a private inference: refused before it starts, or one clear error and nothing left."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from salvit_core import CCT, preset, private
from salvit_core.private.parties import forks, launch, party

pytestmark = pytest.mark.processes

TINY = preset("cct_2_3x1", attention=("self", "external"), normalizer="softmax")
PARTY = [sys.executable, "-m", "salvit_core.private.parties.party"]


def model():
    torch.manual_seed(0)
    return CCT(TINY)


def images(*shape):
    torch.manual_seed(1)
    return torch.randn(*(shape or (1, 1, 8, 8)))


def right(result):
    """By its error: two logits of an untrained network may be nearer to each other than `faithful` asks for."""
    return not result.violations and result.error < 0.05


def ours(process):
    """Not of a test that runs beside this one: parties inherit the name of the pytest worker that started them."""
    name = "PYTEST_XDIST_WORKER"
    try:
        return process.environ().get(name) == os.environ.get(name)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended, or another user's
        return False


def parties_alive():
    """Processes of parties by their names, ROLE:PORT, those that still import by their command lines."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if (
            re.fullmatch("(server|client|dealer):[0-9]+", process.info["name"])
            or "salvit_core.private.parties.party" in (process.info["cmdline"] or [])
        )
        and ours(process)
    ]


def watchers():
    """What the nursery forked and has not ended: parties, and who waits for each."""
    here = forks._here
    if here is None or here.process.poll() is not None:  # one that did not answer in time was ended
        return []
    return psutil.Process(here.process.pid).children(recursive=True)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    assert not parties_alive()
    yield
    deadline = time.monotonic() + 10
    while (parties_alive() or watchers()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not parties_alive() and not watchers()


class Cube(nn.Module):
    def forward(self, x):
        return torch.erf(x.flatten(1))


class Odd(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Sick(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 2)
        self.linear.weight.data[0, 0] = float("nan")

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(images=torch.zeros(1, 3, 8, 8)), r"images have shape \(1, 3, 8, 8\): this network reads \(B, 1, 8, 8\)"),
        (dict(images=torch.zeros(1, 8, 8)), r"images have shape \(1, 8, 8\): give \(B, C, height, width\)"),
        (dict(images=torch.zeros(0, 1, 8, 8)), "at least one image"),
        (dict(images=torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), "images are torch.uint8: give a float32 tensor"),
        (dict(images=[[0.0]]), "images are list: give a float32 tensor"),
        (dict(images=torch.full((1, 1, 8, 8), float("nan"))), "images hold 64 NaN or infinite values"),
        (dict(images=torch.full((1, 1, 8, 8), 1e6)), "images reach 1e.06: fixed point needs values within 1024"),
        (dict(protocol="magic"), "protocol 'magic' is unknown: choose from stock"),
        (dict(device="tpu"), "device is 'tpu': torch has none here"),
        (dict(device="meta", protocol="tuned"), "device is 'meta': give cpu, or cuda where there is a GPU"),
        (dict(reveal="all"), "reveal 'all' is unknown: choose from logits, label"),
        (dict(reveal="label"), "protocol 'stock' opens the logits: choose tuned to reveal the label alone"),
        (dict(provider="HE"), "provider 'HE' is unknown: choose from TFP, TTP"),
        (dict(timeout=0), "timeout is 0: give a positive number"),
        (dict(meet="nowhere"), "meet is 'nowhere': give HOST:PORT"),
        (dict(model=Cube()), r"^no private protocol for erf \(the network itself\): write it with other operations$"),
        (
            dict(model=nn.Sequential(nn.Softsign(), nn.Flatten(), nn.Softplus())),
            r"for abs \(0\): .*;\nno private protocol for softplus \(2\): relu could stand in for it$",
        ),
        (dict(model=Odd()), "Odd cannot be traced by torch.fx"),
        (
            dict(model=nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))),
            r"no private protocol for pad, reflect \(0\)",
        ),
        (dict(model=Sick()), "weights linear.weight hold NaN"),
        (dict(model=nn.Sequential(nn.Linear(5, 2))), "do not fit the network"),
    ],
)
def test_refused_before_any_process_starts(monkeypatch, change, message):
    monkeypatch.setattr(launch, "bear", lambda *a, **k: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=message):
        private.infer(**{"model": model(), "images": images(), **change})


def fail(expected, **options):
    """Run an inference that must fail, and say how long it took to say so."""
    begin = time.monotonic()
    with pytest.raises(private.PrivateInferenceError, match=expected) as caught:
        private.infer(model(), images(), **options)
    assert "\n" not in str(caught.value)
    return time.monotonic() - begin


@pytest.mark.parametrize("victim, name", [("server", r"party 0 \(server\)"), ("client", r"party 1 \(client\)")])
def test_a_killed_party_is_named(victim, name):
    killed = []

    def kill():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for process in parties_alive():
                # Well into the run.
                if process.name().startswith(victim) and sum(process.cpu_times()[:2]) > 1:
                    process.send_signal(signal.SIGKILL)
                    killed.append(time.monotonic())
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    other = "client" if victim == "server" else "server"
    begin = time.monotonic()
    with pytest.raises(private.PrivateInferenceError, match=f"{name} was killed by signal 9") as caught:
        private.infer(CCT(preset("cct_7_3x1")), torch.zeros(1, 3, 32, 32))
    thread.join()
    assert killed and time.monotonic() - killed[0] < 10, (begin, killed)
    assert f"({other})" in str(caught.value)
    # This process, a notebook kernel say, is as alive as before.
    assert right(private.infer(model(), images()))


def test_a_killed_dealer_is_named():
    def kill():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for process in parties_alive():
                if process.name().startswith("dealer") and sum(process.cpu_times()[:2]) > 0.5:
                    process.send_signal(signal.SIGKILL)
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(private.PrivateInferenceError, match=r"party 2 \(dealer\) was killed by signal 9"):
        private.infer(CCT(preset("cct_7_3x1")), torch.zeros(1, 3, 32, 32), provider="TTP")
    thread.join()


def test_time_out():
    assert right(private.infer(model(), images()))  # the nursery has imported what forks need, however busy the machine
    begin = time.monotonic()
    with pytest.raises(private.PrivateInferenceError, match=r"longer than 5 s: party 0 \(server\) was still running"):
        private.infer(CCT(preset("cct_7_3x1")), torch.zeros(16, 3, 32, 32), timeout=5)
    assert time.monotonic() - begin < 25  # the clear logits of 16 images are in it


@pytest.mark.parametrize(
    "private_logits, error, doubt, agrees",
    [
        ([[1.0, 3.0], [0.0, -1.0]], 0.0, 0.0, True),
        ([[1.0, 3.2], [0.0, -1.0]], 0.2, 0.1, True),
        ([[1.0, 3.0], [0.0, -0.6]], 0.4, 0.4, True),
        ([[1.0, 3.0], [-0.6, -0.5]], 0.6, 0.6, False),
        ([[1.0, float("nan")], [0.0, -1.0]], float("inf"), float("inf"), True),
    ],
)
def test_an_answer_is_judged_by_its_margin(private_logits, error, doubt, agrees):
    """Of each image by itself: here the margins are 2 and 1."""
    clear, found = torch.tensor([[1.0, 3.0], [0.0, -1.0]]), torch.tensor(private_logits)
    facts = launch.compared(found, found.argmax(1), clear)
    assert facts == pytest.approx({"error": error, "margin": 1.0, "doubt": doubt, "agrees": agrees})
    assert launch.compared(None, clear.argmax(1), clear)["doubt"] == 0
    assert launch.compared(None, 1 - clear.argmax(1), clear)["doubt"] == float("inf")


@pytest.mark.parametrize("error, agrees", [(0.03, True), (0.05, False), (float("nan"), False)])
def test_what_has_no_classes_is_judged_by_its_largest_number(error, agrees):
    """Two numbers may lie as close as they like: no class hangs on which is the larger."""
    clear = torch.tensor([2.0, 2.0, -0.5, 0.1]).expand(3, 4).unflatten(1, (2, 2)).contiguous()
    found = clear.clone()
    found[1, 0, 1] += error
    facts = launch.compared(found, found.flatten(1).argmax(1), clear)
    wanted = error if error == error else float("inf")
    assert facts == pytest.approx({"error": wanted, "margin": float("inf"), "doubt": 0.0, "agrees": agrees}, abs=1e-6)
    small, off = 1e-3 * clear, torch.full_like(clear, error / 100)
    assert launch.compared(small + off, small.flatten(1).argmax(1), small)["agrees"] == (error / 100 < 2**-10)
    column = clear.flatten(1)[:, :, None, None]  # classes all the same
    assert launch.compared(column, column.flatten(1).argmax(1), column)["margin"] == 0.0


def test_busy_port():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        message = rf"party 0 \(server\): cannot listen on 127.0.0.1:{port} \(Address already in use\)"
        assert fail(message, meet=f"127.0.0.1:{port}") < 10


def test_an_address_of_another_machine():
    fail(r"party 0 \(server\): cannot listen on 192.0.2.1", meet="192.0.2.1:0")


def files(folder, server=TINY, client=TINY):
    """What two hosts would have: each its copy of the architecture, and its own secret."""
    for name, config in (("server", server), ("client", client)):
        (folder / name).mkdir()
        (folder / name / "cct.json").write_text(json.dumps(asdict(config)))
    torch.manual_seed(0)
    torch.save(CCT(server).state_dict(), folder / "server" / "weights.pt")
    torch.save(images(), folder / "client" / "images.pt")
    return {
        "server": [f"--architecture={folder}/server/cct.json", f"--weights={folder}/server/weights.pt"],
        "client": [
            f"--architecture={folder}/client/cct.json",
            f"--images={folder}/client/images.pt",
            f"--result={folder}/client/result.pt",
        ],
    }


def test_mismatched_architecture(tmp_path):
    options = files(tmp_path, client=preset("cct_2_3x1", "EA softmax"))
    with pytest.raises(private.PrivateInferenceError, match="do not agree: architecture: server has .*, client has"):
        launch.run_parties(options, "stock", "127.0.0.1", 0, 60, tmp_path)


def test_weights_that_do_not_fit(tmp_path):
    options = files(tmp_path)
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "server" / "weights.pt")
    message = r"party 0 \(server\) ended with status 1: the weights in weights.pt do not fit the architecture"
    with pytest.raises(private.PrivateInferenceError, match=message):
        launch.run_parties(options, "stock", "127.0.0.1", 0, 60, tmp_path)


def free_port(host):
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def test_two_hosts(tmp_path):
    """The commands of the README, each in a folder that holds only its own secret, meeting at a second address."""
    options = files(tmp_path)
    port = free_port("127.0.0.2")
    running = {
        role: subprocess.Popen(
            [*PARTY, role, f"--meet=127.0.0.2:{port}", "--timeout=60", *options[role]],
            cwd=tmp_path / role,
            stderr=subprocess.PIPE,
            text=True,
        )
        for role in ("client", "server")  # the client may come first: it waits
    }
    for role, process in running.items():
        assert process.wait(60) == 0, (role, process.stderr.read())
        process.stderr.close()
    result = torch.load(tmp_path / "client" / "result.pt")
    with torch.no_grad():
        clear = model().eval()(images())
    torch.testing.assert_close(result["logits"], clear, atol=0.05, rtol=0)
    # The client alone learns the logits.
    assert {path.name for path in (tmp_path / "server").iterdir()} == {"cct.json", "weights.pt"}


def test_a_party_alone_gives_up(tmp_path):
    options = files(tmp_path)
    ended = subprocess.run(
        [*PARTY, "client", f"--meet=127.0.0.1:{free_port('127.0.0.1')}", "--timeout=5", *options["client"]],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode != 0
    assert ended.stderr.strip().splitlines()[-1].startswith("party 1 (client): ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["server", "--meet=127.0.0.1:1"], "the server needs --architecture"),
        (["client", "--meet=nowhere", "--architecture=a", "--images=b", "--result=c"], "expected HOST:PORT"),
        (["spy", "--meet=127.0.0.1:1"], "invalid choice: 'spy'"),
        (["dealer", "--meet=10.0.0.1:1", "--provider=TFP"], "a dealer deals under provider TTP alone"),
        (["dealer", "--meet=somewhere:1"], "a dealer deals under provider TTP alone"),
        (["dealer", "--meet=127.0.0.1:1", "--reveal=label"], "--reveal label needs --protocol tuned"),
    ],
)
def test_command_line_refusals(capsys, arguments, message):
    with pytest.raises(SystemExit):
        party.main(arguments)
    assert message in capsys.readouterr().err


def test_parties_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "study.py"
    script.write_text(
        "import torch\nfrom salvit_core import CCT, preset, private\n"
        "private.infer(CCT(preset('cct_7_3x1')), torch.zeros(1, 3, 32, 32))\n"
    )
    study = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    deadline = time.monotonic() + 60
    while len(parties_alive()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(parties_alive()) == 2
    forked = psutil.Process(study.pid).children(recursive=True)
    assert len(forked) == 5  # the nursery, two parties, and who waits for each
    study.kill()
    study.wait()
    _, alive = psutil.wait_procs(forked, timeout=10)
    assert not alive


def test_a_killed_nursery_is_replaced():
    assert right(private.infer(model(), images()))
    old = forks._here.process
    old.kill()
    old.wait()
    assert right(private.infer(model(), images()))
    assert forks._here.process.pid != old.pid


def test_a_nursery_that_cannot_start(monkeypatch):
    monkeypatch.setattr(forks, "_here", None)
    monkeypatch.setattr(forks.sys, "executable", "/bin/false")
    fail(r"party [01] \((server|client)\) ended with status 1: the process that forks the parties ended")


def test_a_party_has_the_environment_of_its_run(monkeypatch):
    """Not that of the first run, whose nursery it comes from."""
    assert right(private.infer(model(), images()))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    fail("nowhere0")


def test_results_leave_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.tempfile, "tempdir", str(tmp_path))
    private.infer(model(), images())
    assert not list(tmp_path.iterdir())

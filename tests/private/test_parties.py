"""Channels, identities, and who can take a party's place: nobody but who was told."""

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from test_private_faults import inside
from test_private_launch import PARTY, files, free_port, images, model, parties_alive
from torch import nn

from salvit_core import CCT, preset, private
from salvit_core.private.interpreter import fingerprint
from salvit_core.private.parties import dealer, forks, launch, party, rendezvous
from salvit_core.private.transport import Channel, TransportError


def identities(folder, roles=("server", "client", "dealer")):
    """Files and fingerprints by role."""
    paths = {role: folder / f"{role}.pem" for role in roles}
    return paths, {role: rendezvous.create(path) for role, path in paths.items()}


def options(role, paths=None, marks=None, provider="TFP"):
    peers = {} if marks is None else {other: mark for other, mark in marks.items() if other != role}
    identity = None if paths is None else paths[role]
    return Namespace(role=role, identity=identity, peer=peers, provider=provider)


# A channel


@pytest.fixture(params=["plain", "TLS"])
def channels(request, tmp_path):
    """The server's end and the client's of one connection."""
    ends = launch.connected_pair()
    if request.param == "TLS":
        paths, marks = identities(tmp_path, ("server", "client"))
        server, client = (rendezvous._Me(options(role, paths, marks)) for role in ("server", "client"))
        with ThreadPoolExecutor(2) as two:
            first = two.submit(server.greet, ends[0], ["client"], False)
            second = two.submit(client.greet, ends[1], ["server"], True)
            ends = first.result()[1], second.result()[1]
    deadline = time.monotonic() + 60
    yield Channel(ends[0], "client", deadline), Channel(ends[1], "server", deadline)
    for end in ends:
        end.close()


def both(function, channels):
    """What a function of a channel gives at either end, run side by side."""
    with ThreadPoolExecutor(2) as two:
        return list(two.map(function, channels))


def test_large_messages_both_ways_at_once(channels):
    """Far more than the sockets hold: who sent all before reading would wait for ever."""
    ours = {channel: torch.randint(-(2**62), 2**62, (3_000_001,)) for channel in channels}
    for _ in range(3):
        theirs = both(lambda channel: channel.exchange(ours[channel], torch.empty_like(ours[channel])), channels)
        assert torch.equal(theirs[0], ours[channels[1]]) and torch.equal(theirs[1], ours[channels[0]])
    for channel in channels:
        assert (channel.rounds, channel.sent, channel.received) == (3, 3 * 24_000_008, 3 * 24_000_008)


def test_small_messages_and_none(channels):
    server, client = channels

    def play(channel):
        channel.barrier()
        for count in (0, 1, 7, 1000):
            if channel is server:
                channel.send(torch.full((count,), count))
            else:
                assert channel.receive(torch.empty(count, dtype=torch.int64)).tolist() == [count] * count
        channel.say({"terms": [1, "two", None]})
        assert channel.hear() == {"terms": [1, "two", None]}

    both(play, channels)
    assert (server.rounds, server.sent, server.received) == (4, 8 * 1008, 0)
    assert (client.rounds, client.sent, client.received) == (4, 0, 8 * 1008)
    client.reset()
    assert (client.rounds, client.sent, client.received) == (0, 0, 0)


def test_a_peer_that_leaves_is_named(channels):
    server, client = channels
    client.close()
    with pytest.raises(TransportError, match="lost the connection to the other party, the client") as caught:
        for _ in range(20):
            server.exchange(torch.zeros(100_000, dtype=torch.int64), torch.empty(100_000, dtype=torch.int64))
    assert "\n" not in str(caught.value)


def test_a_silent_peer_is_not_waited_for_beyond_the_deadline(channels):
    channels[0].deadline = time.monotonic() + 0.3
    with pytest.raises(TransportError, match="the client did not answer in time"):
        channels[0].exchange(torch.zeros(3_000_000, dtype=torch.int64), torch.empty(3_000_000, dtype=torch.int64))
    assert time.monotonic() - channels[0].deadline < 5


def test_what_a_peer_says_is_bounded():
    ours, theirs = launch.connected_pair()
    channel = Channel(ours, "client", time.monotonic() + 10)
    theirs.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(TransportError, match="the client sent a message of 4294967295 bytes where 65536 are the most"):
        channel.hear()
    theirs.sendall(b"\x00\x00\x00\x02{]")
    with pytest.raises(TransportError, match="the client sent what is not JSON"):
        channel.hear()
    theirs.close()
    channel.close()


# Identities


def test_an_identity_is_for_one_user_and_never_overwritten(tmp_path, capsys):
    path = tmp_path / "server.pem"
    party.main(["identity", "--out", str(path)])
    mark = capsys.readouterr().out.strip()
    assert path.stat().st_mode & 0o777 == 0o600 and len(mark) == 64
    assert rendezvous.fingerprint(rendezvous._certificate(path)) == mark
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="is there already: an identity is never overwritten"):
        party.main(["identity", f"--out={path}"])
    assert path.read_bytes() == before
    path.chmod(0o640)
    with pytest.raises(rendezvous.PartyError, match="can be read by others: chmod 600"):
        rendezvous._certificate(path)


CLIENT = ["client", "--architecture=a", "--images=b", "--result=c"]
FAR = "--meet=192.0.2.1:29500"
HERE = "--meet=127.0.0.1:29500"


@pytest.mark.parametrize(
    "words, message",
    [
        ([FAR, "--protocol=tuned"], "provider TFP is for one machine and 192.0.2.1:29500 is another: the server would"),
        (["--meet=0.0.0.0:29500", "--protocol=tuned"], "provider TFP is for one machine"),
        ([FAR], "the server would hold both keys and could unmask the client's images; give --provider TTP"),
        ([FAR, "--tunnel"], "provider TFP is for one machine"),
        ([HERE, "--tunnel"], "provider TFP is for one machine and the other end of the tunnel is another"),
        ([FAR, "--provider=TTP"], "stock sends everything in clear and 192.0.2.1:29500 is not this machine: choose"),
        (
            [FAR, "--protocol=tuned", "--provider=TTP", "--dealer=127.0.0.1:1"],
            "192.0.2.1:29500 needs identities: run salvit party identity --out client.pem, tell the others the "
            "fingerprint that it prints, and give --identity client.pem --peer server=FINGERPRINT --peer dealer=",
        ),
        (
            [HERE, "--protocol=tuned", "--provider=TTP", "--dealer=dealer.example:1"],
            "dealer.example:1 needs identities",
        ),
        ([HERE, "--protocol=tuned", f"--peer=server={'0' * 64}"], "--peer needs identities"),
        ([HERE, "--protocol=tuned", "--tunnel", "--provider=TTP", "--dealer=127.0.0.1:1"], "--tunnel is for stock"),
        ([HERE, "--protocol=stock", "--identity=x.pem"], "which know no identities: choose --protocol tuned"),
        ([HERE, "--protocol=tuned", "--identity=x.pem"], "nobody knows the server: give --peer server=FINGERPRINT"),
    ],
)
def test_what_would_not_be_private_is_refused(words, message):
    with pytest.raises(SystemExit) as caught:
        party.main([*CLIENT, *words])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_of_a_party_stays_in_the_process_that_called_it():
    """Its time-out once ended a worker of these tests, ten minutes after a refusal."""
    before, name = set(threading.enumerate()), Path("/proc/self/comm").read_text()
    with pytest.raises(SystemExit):
        party.main([*CLIENT, HERE, "--protocol=tuned", "--identity=x.pem"])
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()
    assert Path("/proc/self/comm").read_text() == name


def test_a_pickled_architecture_is_not_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("x.pt", "x.json"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        words = ["server", HERE, f"--architecture={tmp_path / name}", "--weights=w"]
        with pytest.raises(SystemExit, match="is no configuration of a network in JSON"):
            party.main(words)
        with pytest.raises(SystemExit):
            party.main([*words, f"--graph={tmp_path / name}"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["vit_2", "efficientvit_test"])
def test_an_architecture_is_a_file_or_a_preset(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    graph, config = party.read_architecture(Path(name))
    assert config == preset(name)
    (tmp_path / name).write_text(json.dumps(dataclasses.asdict(preset(name, classes=3))))
    others, changed = party.read_architecture(Path(name))  # a file of that name is a file
    assert changed.classes == 3 and fingerprint(others) != fingerprint(graph)
    with pytest.raises(party.PartyError, match="nothing"):
        party.read_architecture(Path("nothing"))


# Three processes by hand


@contextlib.contextmanager
def started(commands):
    """Processes by role, each ended at the latest when the test is."""
    running = {}
    try:
        for role, words in commands.items():
            running[role] = subprocess.Popen([*PARTY, role, *words], stderr=subprocess.PIPE, text=True)
        yield running
    finally:
        for process in running.values():
            process.kill()
            process.wait()
            process.stderr.close()


def ended(running, seconds=150):
    """(status, what it said) of every process."""
    return {role: (process.wait(seconds), process.stderr.read().strip()) for role, process in running.items()}


def by_hand(folder, provider="TTP", places=("127.0.0.1", "127.0.0.3"), timeout=120):
    """Options by role, without identities."""
    meet, dealer = (f"{host}:{free_port(host)}" for host in places)
    common = ["--protocol=tuned", f"--provider={provider}", f"--timeout={timeout}", f"--meet={meet}"]
    common += [f"--dealer={dealer}"] if provider == "TTP" else []
    roles = ("dealer", "server", "client") if provider == "TTP" else ("server", "client")
    return {role: common + words for role, words in ({"dealer": []} | files(folder)).items() if role in roles}


def known(commands, paths, marks):
    """The options with identities."""
    for role, words in commands.items():
        words += [f"--identity={paths[role]}"]
        words += [f"--peer={other}={marks[other]}" for other in commands if other != role]
    return commands


def place(words, option):
    host, _, port = next(word for word in words if word.startswith(option)).partition("=")[2].rpartition(":")
    return host, int(port)


def knock(where, deadline):
    """A connection, as soon as somebody listens."""
    while True:
        try:
            return socket.create_connection(where, timeout=5)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def show(where, certificate, deadline):
    """Show a certificate, and read what the listening party says to it until it closes."""
    with knock(where, deadline) as connection:
        connection.sendall(struct.pack("!H", len(certificate)) + certificate + b"\x01" + b"no TLS" * 100)
        connection.settimeout(30)
        said = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(4096):
                said += part
        return said[2 + struct.unpack("!H", said[:2])[0] :][:1]


def strange(where, right, wrong):
    """All that strangers try at a listening party: silence, garbage, certificates, a thousand connections."""
    deadline = time.monotonic() + 60
    left = [knock(where, deadline) for _ in range(6)]
    left[0].sendall(b"\xff" * 5000)
    left[1].sendall(b"\xff\xff")
    left[2].sendall(b"\x00\x00")
    assert show(where, wrong, deadline) == b"\x00"
    assert show(where, right, deadline) == b"\x01"  # it is public: the key is not
    for _ in range(1000):
        with contextlib.suppress(OSError):
            left.append(socket.create_connection(where, timeout=0.5))
        if len(left) > 300:
            left.pop(0).close()
    return left


@pytest.mark.processes
def test_three_processes_with_identities_among_strangers(tmp_path):
    paths, marks = identities(tmp_path)
    commands = known(by_hand(tmp_path), paths, marks)
    doors = [place(commands["server"], "--meet"), place(commands["dealer"], "--dealer")]
    (tmp_path / "strange").mkdir()
    with started({role: commands[role] for role in ("dealer", "server")}) as first:
        others = []
        _, foreign = identities(tmp_path / "strange"), rendezvous._certificate(tmp_path / "strange" / "client.pem")
        for where in doors:
            others += strange(where, rendezvous._certificate(paths["client"]), foreign)
        assert all(process.poll() is None for process in first.values())
        with started({"client": commands["client"]}) as last:
            done = ended({**first, **last})
        assert done == dict.fromkeys(("dealer", "server", "client"), (0, ""))
        for connection in others:
            connection.close()
    result = torch.load(tmp_path / "client" / "result.pt")
    with torch.no_grad():
        clear = model().eval()(images())
    torch.testing.assert_close(result["logits"], clear, atol=0.05, rtol=0)
    # The client alone learns the logits.
    assert {path.name for path in (tmp_path / "server").iterdir()} == {"cct.json", "weights.pt"}


@pytest.mark.processes
@pytest.mark.parametrize("wrong, liar", [("server", "client"), ("client", "server")])
def test_a_wrong_fingerprint_is_refused_in_one_line_on_both_sides(tmp_path, wrong, liar):
    """A party was told another fingerprint of its peer than the peer's."""
    paths, marks = identities(tmp_path)
    commands = known(by_hand(tmp_path, "TFP", timeout=40), paths, marks)
    commands[liar] = [word.replace(marks[wrong], marks["dealer"]) for word in commands[liar]]
    with started(commands) as running:
        done = ended(running)
    assert all(status == 1 and "\n" not in said for status, said in done.values()), done
    shown = f"it showed a certificate with fingerprint {marks[wrong]}, expected {marks['dealer']}"
    unknown = f"the {liar} does not know this {wrong}, whose fingerprint is {marks[wrong]}"
    assert (shown if liar == "client" else unknown) in done["client"][1]
    assert (shown if liar == "server" else unknown) in done["server"][1]
    assert "the client did not come in time; turned away: " in done["server"][1]


@pytest.mark.processes
def test_peers_that_do_not_agree(tmp_path):
    commands = by_hand(tmp_path, "TFP")
    commands["server"] += ["--bits=10"]
    with started(commands) as running:
        done = ended(running)
    assert done["server"] == (1, "party 0 (server): the parties do not agree: bits: client has 13, server has 10")
    assert done["client"] == (1, "party 1 (client): the parties do not agree: bits: server has 10, client has 13")


# The dealer

KEYS = """
import salvit_core.private.{module} as module

def noted(before=module.new_key):
    key = before()
    with open({path!r}, "ab") as file:
        file.write(key)
    return key

module.new_key = noted
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    "provider, role, module", [("TTP", "dealer", "parties.dealer"), ("TFP", "server", "tuned.protocol")]
)
def test_no_key_passes_between_the_parties(monkeypatch, tmp_path, provider, role, module):
    """With a dealer; without one the server sends the client its key, which shows that this would be seen."""
    path = tmp_path / "keys"
    inside(monkeypatch, tmp_path / "site", role, KEYS.format(module=module, path=str(path)))
    result = private.infer(model(), images(), "tuned", provider, audit=tmp_path)
    assert result.faithful and (result.protocol, result.provider) == ("tuned", provider)
    assert result.dealer_bytes == result.operations["offline_bytes"].sum() > 0
    keys = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.int64)
    assert len(keys) == 8  # each party's for the weights and for one query; without a dealer the client's come first
    passed = torch.cat([x for name in ("server", "client") for x in torch.load(tmp_path / f"{name}.pt")])
    assert torch.isin(keys, passed).tolist() == [provider == "TFP"] * 4 + [False] * 4


def test_a_dealer_refuses_what_differs_and_what_it_does_not_know():
    fine = {"queries": 1, "weights": [["w", [2]]], "calls": [[["square", [[2]]]]]}
    for server, client, message in (
        (fine, fine | {"queries": 2}, "ask for different correlations"),
        (fine | {"calls": [[["__import__", []]]]},) * 2 + ("no dealer has __import__",),
        ({"queries": 1},) * 2 + ("sent no list of correlations",),
        ([1],) * 2 + ("sent no list of correlations",),
    ):
        pairs = {role: launch.connected_pair() for role in ("server", "client")}
        deadline = time.monotonic() + 10
        for role, asked in (("server", server), ("client", client)):
            Channel(pairs[role][1], "dealer", deadline).say(asked)
        with pytest.raises(rendezvous.PartyError, match=message):
            dealer.serve({role: Channel(pair[0], role, deadline) for role, pair in pairs.items()})
        for end in (*pairs["server"], *pairs["client"]):
            end.close()


# One machine


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Runs a long inference; what a function sees of its parties meanwhile is collected."""
    monkeypatch.setattr(launch.tempfile, "tempdir", str(tmp_path))

    def run(look, **options):
        seen, over = [], threading.Event()

        def watch():
            while not over.is_set():
                seen.append(look(parties_alive()))
                time.sleep(0.05)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            network = CCT(preset("cct_4_3x1", "SA softmax"))
            assert private.infer(network, torch.zeros(4, 1, 8, 8), "tuned", **options).faithful
        finally:
            over.set()
            thread.join()
        return seen

    return run


@pytest.mark.processes
def test_nothing_listens_while_a_local_run_is_on(watched):
    def look(processes):
        found = []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                found += [connection.status for connection in process.net_connections("inet")]
        return found

    seen = [status for found in watched(look, provider="TTP") for status in found]
    assert "ESTABLISHED" in seen and "LISTEN" not in seen


@pytest.mark.processes
def test_the_environment_is_on_no_disk(watched, tmp_path, monkeypatch):
    monkeypatch.setenv("SALVIT_SECRET", "correct horse battery")

    def look(_):
        found = set()
        for path in tmp_path.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file():
                    found.add((path.name, b"correct horse battery" in path.read_bytes()))
        return found

    seen = set().union(*watched(look))
    assert "client.log" in {name for name, _ in seen} and not any(held for _, held in seen)


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_no_weights_and_no_images(tmp_path, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup")
    script = tmp_path / "study.py"
    script.write_text(
        "import torch\nfrom salvit_core import CCT, preset, private\n"
        "private.infer(CCT(preset('cct_7_3x1')), torch.zeros(1, 3, 32, 32), 'tuned')\n"
    )
    room = tmp_path / "room"
    room.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "TMPDIR": str(room)}
    study = subprocess.Popen([sys.executable, str(script)], env=environment)
    deadline = time.monotonic() + 100
    while not list(room.rglob("images.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(room.rglob("images.pt"))
    study.send_signal(number)
    assert study.wait(10) == -number
    deadline = time.monotonic() + 60  # a nursery that still imports hears of it later
    while list(room.glob("salvit-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(room.glob("salvit-*"))


@pytest.mark.processes
def test_a_nursery_that_hangs_is_not_waited_for():
    assert private.infer(model(), images(), "tuned").faithful
    old = forks._here.process
    old.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(private.PrivateInferenceError, match="longer than 3 s: the process that forks the parties did"):
        private.infer(model(), images(), "tuned", timeout=3)
    assert time.monotonic() - begin < 6
    assert old.poll() is not None
    assert private.infer(model(), images(), "tuned").faithful


@pytest.mark.processes
def test_the_servers_product_is_on_its_clock():
    """The client has sent its part and goes on; the product is the server's, and of this row."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1)).eval()
    table = private.infer(network, torch.randn(1, 1, 512, 1024), "tuned").operations
    wide = table[table["rounds"] > 0].iloc[0]
    assert wide["server_seconds"] > wide["seconds"], table
    assert table["seconds"].sum() == pytest.approx(table["server_seconds"].sum(), rel=0.2), table

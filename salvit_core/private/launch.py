"""Starts the parties' processes on this machine, watches them, and collects what the client learnt."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pandas as pd
import torch
from torch import nn

from ..graph import KINDS, trace
from .interpreter import DomainInterpreter, unsupported
from .party import PROTOCOLS, PROVIDERS, ROLES, PartyError, image_problem, listen, write_architecture

# The encrypted logits count as the clear ones when they differ by no more than this anywhere.
TOLERANCE = 0.05

# How long the surviving parties may take to say why they stop.
LAST_WORDS = 4.0


class PrivateInferenceError(RuntimeError):
    """A party failed; the message names it and carries the others' last words."""


@dataclass(frozen=True)
class Result:
    """What one private inference gave and cost, as the client saw it.

    Attributes:
        logits: (B, classes), decoded by the client.
        operations: one row per layer and kind of operation, with seconds, rounds and bytes (one way); columns add up to
            the totals. Leave out the kind "LayerNorm" for the paper's accounting (Section 4, "Experimental setup").
        seconds: wall time online, from sharing the images to the logits. Beaver triples are made on the way, as
            CrypTen does it; sharing the weights and starting the processes is not in it.
        rounds: exchanges between the parties.
        bytes: one way, (sent + received) / 2 at the client; the dealer's traffic is not in it.
        error: largest difference to the clear logits.
        violations: operations whose inputs leave the domain of their protocol, each with the values and the domain.
        setup: seconds from the client's start to the first secret image.
        threads: threads per party.
    """

    logits: torch.Tensor
    operations: pd.DataFrame
    error: float
    violations: list[str]
    setup: float
    threads: int

    @property
    def seconds(self) -> float:
        """Total of the operations' seconds."""
        return float(self.operations["seconds"].sum())

    @property
    def rounds(self) -> int:
        """Total of the operations' rounds."""
        return int(self.operations["rounds"].sum())

    @property
    def bytes(self) -> int:
        """Total of the operations' bytes, one way."""
        return int(self.operations["bytes"].sum())

    @property
    def faithful(self) -> bool:
        """Whether the answer is the clear network's: no operation left its domain and the logits agree."""
        return not self.violations and self.error <= TOLERANCE


def infer(
    model: nn.Module,
    images: torch.Tensor,
    protocol: str = "stock",
    provider: str = "TFP",
    timeout: float = 600.0,
    meet: str = "127.0.0.1:0",
    bits: int | None = None,
) -> Result:
    """Run the whole network on secret shares, each party in an operating-system process of its own.

    Party 0 (server) gets the weights, party 1 (client) the images; with provider "TTP" party 2 deals the triples. With
    "TFP" party 0 makes them itself and could unmask everything: CrypTen's default, fit for measuring only.

    Args:
        model: any module whose operations the protocol knows; it is used in evaluation mode and not changed.
        images: (B, C, height, width), float, normalised pixels.
        protocol: "stock", CrypTen's own functions.
        provider: "TFP" or "TTP", who makes the Beaver triples.
        timeout: seconds for everything, starting the processes included.
        meet: HOST:PORT, an address of this machine where the parties meet; port 0 takes a free one.

    Raises:
        ValueError: an input or a model that cannot be run, before any process starts.
        PrivateInferenceError: a party failed or time ran out; no process is left behind.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"provider {provider!r} is unknown: choose from {', '.join(PROVIDERS)}")
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout!r}: give a positive number of seconds")
    host, _, port = meet.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"meet is {meet!r}: give HOST:PORT, such as 127.0.0.1:0")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown: choose from {', '.join(PROTOCOLS)}")
    if problem := image_problem(images):
        raise ValueError(problem)
    graph = trace(model)
    if broken := [name for name, value in graph.state_dict().items() if not value.isfinite().all()]:
        raise ValueError(f"weights {', '.join(broken[:3])} hold NaN or infinite values: they cannot be shared")
    clear, violations = _in_the_clear(graph, images, PROTOCOLS[protocol], getattr(model, "config", None))

    with tempfile.TemporaryDirectory(prefix="salvit-") as folder:
        server, client = Path(folder, "server"), Path(folder, "client")
        server.mkdir()
        client.mkdir()
        torch.save(graph.state_dict(), server / "weights.pt")
        torch.save(images.float(), client / "images.pt")
        write_architecture(deepcopy(graph), Path(folder, "architecture.pt"))
        inputs = {
            "server": [f"--weights={server / 'weights.pt'}"],
            "client": [f"--images={client / 'images.pt'}", f"--result={client / 'result.pt'}"],
            "dealer": [],
        }
        options = [f"--architecture={folder}/architecture.pt", f"--protocol={protocol}", f"--provider={provider}"]
        options += [] if bits is None else [f"--bits={bits}"]
        roles = ROLES if provider == "TTP" else ROLES[:2]
        run_parties({role: options + inputs[role] for role in roles}, host, int(port), timeout, Path(folder))
        found = torch.load(client / "result.pt", weights_only=True)

    rows = pd.DataFrame(found["operations"]).groupby(["layer", "kind"], sort=False).sum().reset_index()
    rows["kind"] = pd.Categorical(rows["kind"], KINDS)
    error = float((found["logits"] - clear).abs().max())
    return Result(found["logits"], rows, error, violations, found["setup"], found["threads"])


def _in_the_clear(graph, images, table: ModuleType, config) -> tuple[torch.Tensor, list[str]]:
    """The clear logits, and what leaves its domain on the way; refuses what cannot be run."""
    if missing := unsupported(graph, table):
        raise ValueError(f"no private protocol for {', '.join(missing)}: {table.__name__} lists what there is")
    if config is not None and tuple(images.shape[1:]) != (config.channels, config.image, config.image):
        expected = f"(B, {config.channels}, {config.image}, {config.image})"
        raise ValueError(f"images have shape {tuple(images.shape)}: this network reads {expected}")
    clear = DomainInterpreter(graph, table)
    try:
        with torch.no_grad():
            logits = clear.run(images.float())
    except RuntimeError as error:
        raise ValueError(f"images of shape {tuple(images.shape)} do not fit the network: {error}") from error
    return logits, clear.violations


def run_parties(parties: dict[str, list[str]], host: str, port: int, timeout: float, folder: Path) -> None:
    """Run one process per role to its end.

    Args:
        parties: role to its command-line options, without --meet.
        host: address to meet at; one of this machine's.
        port: port to meet at, 0 for a free one.
        timeout: seconds for all of it.
        folder: where the processes' logs go.

    Raises:
        PrivateInferenceError: a party failed or time ran out, with every party's last words.
    """
    try:
        meeting = listen(host, port)
    except PartyError as error:
        raise PrivateInferenceError(f"party 0 (server): {error}") from error
    port = meeting.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // len(parties)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    running: dict[str, subprocess.Popen] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(meeting)
        stack.callback(_stop, running)
        for role, options in parties.items():
            command = [sys.executable, "-m", "salvit_core.private.party", role, f"--meet={host}:{port}", "--leash"]
            inherited = [meeting.fileno()] if role == "server" else []
            if inherited:
                command.append(f"--listen={inherited[0]}")
            log = stack.enter_context(open(folder / f"{role}.log", "wb"))
            running[role] = subprocess.Popen(
                [*command, f"--timeout={timeout + 5}", *options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=inherited,
            )
        meeting.close()
        _watch(running, time.monotonic() + timeout, timeout, folder)


def _watch(running: dict[str, subprocess.Popen], deadline: float, timeout: float, folder: Path) -> None:
    while any(process.poll() is None for process in running.values()):
        failed = [role for role, process in running.items() if process.poll() not in (None, 0)]
        if failed:
            # Give the survivors a moment to notice and say so.
            patience = time.monotonic() + LAST_WORDS
            while time.monotonic() < patience and any(process.poll() is None for process in running.values()):
                time.sleep(0.05)
            break
        if time.monotonic() > deadline:
            words = _last_words(list(running), running, folder)
            raise PrivateInferenceError(f"private inference took longer than {timeout:g} s: {words}")
        time.sleep(0.05)
    else:
        failed = [role for role, process in running.items() if process.poll() != 0]
    if failed:
        others = [role for role in running if role not in failed]
        raise PrivateInferenceError(_last_words(failed + others, running, folder))


def _last_words(roles: list[str], running: dict[str, subprocess.Popen], folder: Path) -> str:
    words = []
    for role in roles:
        lines = (folder / f"{role}.log").read_text(errors="replace").strip().splitlines()
        status = running[role].poll()
        fate = {None: "was still running", 0: "ended well"}.get(status, f"ended with status {status}")
        if status is not None and status < 0:
            fate = f"was killed by signal {-status}"
        last = lines[-1].removeprefix(f"party {ROLES.index(role)} ({role}): ") if lines else "(said nothing)"
        words.append(f"party {ROLES.index(role)} ({role}) {fate}: {last}")
    return "; ".join(words)


def _stop(running: dict[str, subprocess.Popen]) -> None:
    for process in running.values():
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdin.close()

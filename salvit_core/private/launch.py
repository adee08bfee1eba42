"""Starts the parties' processes on this machine, watches them, and collects what the client learnt."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pandas as pd
import torch
from torch import nn

from ..graph import KINDS, TRACING, trace
from .interpreter import DomainInterpreter, unsupported
from .network import Link
from .nursery import Born, bear
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
            Besides: serial_bytes, the bytes that follow one another on the way (a message that goes one way counts
            half in bytes, whole here); offline_seconds, the dealer's part of seconds; offline_bytes, what a dealer
            must send (with `tuned`; CrypTen does not tell).
        seconds: wall time from sharing the images to the logits, the making of correlated randomness included; sharing
            the weights and starting the processes is not in it. The sum over all queries.
        rounds: exchanges or one-way messages between the parties.
        bytes: one way, (sent + received) / 2 at the client; the dealer's traffic is not in it.
        error: largest difference to the clear logits.
        violations: operations whose inputs leave the domain of their protocol, each with the values and the domain.
        setup: seconds from the client's start to the first secret image.
        threads: threads per party.
        queries: the operations of every query by itself, with its number in column query.
        drift: where asked for, one row per module's result: node, layer, kind, error (largest difference to the clear
            result) and scale (its largest absolute value).
    """

    logits: torch.Tensor
    operations: pd.DataFrame
    error: float
    violations: list[str]
    setup: float
    threads: int
    queries: pd.DataFrame
    drift: pd.DataFrame | None = None

    @property
    def seconds(self) -> float:
        """Total of the operations' seconds."""
        return float(self.operations["seconds"].sum())

    @property
    def offline(self) -> float:
        """Total of the seconds that the dealer's work took; `seconds` less this is the time online."""
        return float(self.operations["offline_seconds"].sum())

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
    link: Link | None = None,
    timeout: float = 600.0,
    meet: str = "127.0.0.1:0",
    bits: int | None = None,
    batch: int | None = None,
    check: bool = False,
    drift: bool = False,
    audit: Path | None = None,
    progress: Callable[[dict], None] | None = None,
) -> Result:
    """Run the whole network on secret shares, each party in an operating-system process of its own.

    Party 0 (server) gets the weights, party 1 (client) the images; with provider "TTP" party 2 deals the correlated
    randomness. With "TFP" party 0 makes it itself and could unmask everything: CrypTen's default, fit for measuring
    only.

    Args:
        model: any module whose operations the protocol knows; it is used in evaluation mode and not changed.
        images: (B, C, height, width), float, normalised pixels.
        protocol: "stock", CrypTen's own functions, or "tuned", ours.
        provider: "TFP" or "TTP", who makes the correlated randomness.
        link: delays every message as this connection would; None for the bare loopback.
        timeout: seconds for everything, starting the processes included.
        meet: HOST:PORT, an address of this machine where the parties meet; port 0 takes a free one.
        bits: fractional bits; None for the protocol's own, 16 with "stock" and 13 with "tuned". Each one more makes a
            failed truncation four times as likely: with "tuned" 1e-4 per inference of CCT-7/3x1 at 13, 1 at 20.
        batch: images in a query, in one session after another; None for all images in one query.
        check: find, on shares, values that leave the range of a "tuned" protocol; each check opens one flag.
        drift: compare every activation with the clear one; the parties give up their shares for it after the run.
        audit: a folder where each party of "tuned" writes all messages that it received, as a list of tensors.
        progress: called now and then with what the client has so far: logits and operations.

    Raises:
        ValueError: an input or a model that cannot be run, before any process starts.
        PrivateInferenceError: a party failed or time ran out; no party is left behind.
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
    if (check or audit) and protocol != "tuned":
        raise ValueError(f"protocol {protocol!r} knows neither check nor audit: choose tuned")
    if bits is not None and not 8 <= bits <= 22:
        raise ValueError(f"bits is {bits!r}: give 8 to 22 fractional bits, or None")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch!r}: give at least 1 image in a query, or None")
    if problem := image_problem(images):
        raise ValueError(problem)
    graph = trace(model)
    if broken := [name for name, value in graph.state_dict().items() if not value.isfinite().all()]:
        raise ValueError(f"weights {', '.join(broken[:3])} hold NaN or infinite values: they cannot be shared")
    with TRACING:
        clear, violations = _in_the_clear(graph, images, PROTOCOLS[protocol], getattr(model, "config", None))

    with tempfile.TemporaryDirectory(prefix="salvit-") as name:
        folder = Path(name)
        server, client = folder / "server", folder / "client"
        server.mkdir()
        client.mkdir()
        torch.save(graph.state_dict(), server / "weights.pt")
        torch.save(images.float(), client / "images.pt")
        write_architecture(deepcopy(graph), folder / "architecture.pt")
        options = [f"--architecture={folder}/architecture.pt", f"--protocol={protocol}", f"--provider={provider}"]
        options += [] if bits is None else [f"--bits={bits}"]
        options += [] if batch is None else [f"--batch={batch}"]
        options += [] if link is None else [f"--link={link.rtt},{link.bandwidth}"]
        options += ["--check"] if check else []
        inputs = {
            "server": [f"--weights={server / 'weights.pt'}"],
            "client": [f"--images={client / 'images.pt'}", f"--result={client / 'result.pt'}"],
            "dealer": [],
        }
        for role in ROLES[:2]:
            inputs[role] += [f"--drift={folder / role / 'drift.pt'}"] if drift else []
            inputs[role] += [f"--audit={Path(audit).resolve() / f'{role}.pt'}"] if audit else []
        roles = ROLES if provider == "TTP" else ROLES[:2]
        watch = None if progress is None else _reporting(client / "result.pt", progress)
        run_parties({role: options + inputs[role] for role in roles}, host, int(port), timeout, folder, watch)
        found = torch.load(client / "result.pt", weights_only=True)
        with TRACING:
            table = _drift(graph, images, protocol, folder) if drift else None

    queries = pd.DataFrame(found["operations"]).groupby(["query", "layer", "kind"], sort=False).sum().reset_index()
    rows = queries.drop(columns="query").groupby(["layer", "kind"], sort=False).sum().reset_index()
    rows["kind"] = pd.Categorical(rows["kind"], KINDS)
    error = float((found["logits"] - clear).abs().max())
    violations += [f"{place}: values left the protocol's range (seen on shares)" for place in found["violations"]]
    return Result(found["logits"], rows, error, violations, found["setup"], found["threads"], queries, table)


def _reporting(path: Path, progress: Callable[[dict], None]) -> Callable[[], None]:
    """Hands over the client's file whenever it is a new one."""
    seen = None

    def look() -> None:
        nonlocal seen
        if path.exists() and path.stat().st_ino != seen:
            seen = path.stat().st_ino
            progress(torch.load(path, weights_only=True))

    return look


def _drift(graph: torch.fx.GraphModule, images: torch.Tensor, protocol: str, folder: Path) -> pd.DataFrame:
    """Each activation of the last query: the parties' shares, added up here, against the clear one."""
    shares = [torch.load(folder / role / "drift.pt", weights_only=True) for role in ROLES[:2]]
    size = next(iter(shares[0].values()))[0][0].shape[0]
    start = (len(images) - 1) // size * size
    clear = _Keeping(PROTOCOLS[protocol].rewrite(deepcopy(graph)))
    with torch.no_grad():
        clear.run(images[start:].float())
    rows = []
    for node in clear.module.graph.nodes:
        if node.name not in shares[0]:
            continue
        value = 1.0
        for (ours, bits), (theirs, _) in zip(*(share[node.name] for share in shares), strict=True):
            value = value * ((ours + theirs).double() / 2.0**bits)
        exact = clear.kept[node.name]
        error = (value[: len(exact)] - exact).abs().max().item()
        place = {"node": str(node.target), "layer": node.meta["layer"], "kind": node.meta["kind"]}
        rows.append({**place, "error": error, "scale": exact.abs().max().item()})
    return pd.DataFrame(rows)


class _Keeping(torch.fx.Interpreter):
    """Keeps every activation by its node's name."""

    def __init__(self, graph: torch.fx.GraphModule):
        super().__init__(graph)
        self.kept: dict[str, torch.Tensor] = {}

    def run_node(self, node):
        value = super().run_node(node)
        self.kept[node.name] = value
        return value


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


def run_parties(
    parties: dict[str, list[str]],
    host: str,
    port: int,
    timeout: float,
    folder: Path,
    look: Callable[[], None] | None = None,
) -> None:
    """Run one process per role to its end.

    Args:
        parties: role to its command-line options, without --meet.
        host: address to meet at; one of this machine's.
        port: port to meet at, 0 for a free one.
        timeout: seconds for all of it.
        folder: where the processes' logs go.
        look: called now and then while they run.

    Raises:
        PrivateInferenceError: a party failed or time ran out, with every party's last words.
    """
    try:
        meeting = listen(host, port)
    except PartyError as error:
        raise PrivateInferenceError(f"party 0 (server): {error}") from error
    port = meeting.getsockname()[1]
    deadline = time.monotonic() + timeout
    threads = max(1, (os.cpu_count() or 1) // len(parties))
    running: dict[str, Born] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(meeting)
        stack.callback(_stop, running)
        for role, options in parties.items():
            words = [role, f"--meet={host}:{port}", "--leash", f"--timeout={timeout + 5}", *options]
            running[role] = bear(words, folder, threads, [meeting.fileno()] if role == "server" else [])
        meeting.close()
        _watch(running, deadline, timeout, folder, look)


def _watch(running: dict[str, Born], deadline: float, timeout: float, folder: Path, look=None) -> None:
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
        if look is not None:
            look()
        time.sleep(0.05)
    else:
        failed = [role for role, process in running.items() if process.poll() != 0]
    if failed:
        others = [role for role in running if role not in failed]
        raise PrivateInferenceError(_last_words(failed + others, running, folder))


def _last_words(roles: list[str], running: dict[str, Born], folder: Path) -> str:
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


def _stop(running: dict[str, Born]) -> None:
    for process in running.values():
        if process.poll() is None:
            process.kill()
        process.wait()
        process.close()

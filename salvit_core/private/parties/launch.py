"""Starts the parties' processes on this machine, watches them, and collects what the client learnt."""

import contextlib
import functools
import itertools
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ...fields import shown
from ...models.graph import TRACING
from ...models.operations import KINDS
from .. import protocol_of
from ..asked import (
    DAYS,
    Asked,
    config_of,
    folder_problem,
    image_problem,
    link_problem,
    memory_problem,
    model_problem,
    query_size,
    weight_problem,
)
from ..estimation import Costs, estimate
from ..interpreter import DomainInterpreter, network_of
from ..links import Link
from ..protocol import ROLES, Protocol
from .forks import Born, Silent, bear, guard
from .party import PartyError, packed, packed_graph
from .rendezvous import listen

# The answer counts as the clear one when no logit errs by more than this part of the margin between the two highest:
# from a half on an error could swap them.
DOUBT = 0.25

# Of what has no classes, such as tokens: when no number of an image errs by more than this part of its largest, or by
# what a few roundings of fixed point come to, whatever the size of the rest.
NEAR, ROUNDED = 0.02, 2**-10

# A query of more images is looked at before: it may not fit in memory.
ROOMY = 16

# A fork of a process whose torch computed with several threads has none of them, and would wait for them for ever.
os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))

_ROOM = "set TMPDIR to a folder with room for weights and images"

# How long the surviving parties may take to say why they stop.
LAST_WORDS = 4.0


class PrivateInferenceError(RuntimeError):
    """A party failed; the message names it and carries the others' last words."""


@dataclass(frozen=True)
class Result(Costs):
    """What one private inference gave and cost, as the client saw it.

    Attributes:
        logits: (B, classes), decoded by the client; None where only labels were revealed.
        labels: (B,) int64, the classes with the highest logits.
        operations: one row per layer and kind of operation, with seconds, rounds and bytes (one way); columns add up to
            the totals. Leave out the kind "LayerNorm" for the paper's accounting (Section 4, "Experimental setup").
            Besides: serial_bytes, the bytes that follow one another on the way (a message that goes one way counts
            half in bytes, whole here); offline_seconds, the dealer's part of seconds; offline_bytes, what a dealer
            of its own sends, or would send; server_seconds, by the server's clock: what it computes when the client has
            already sent its part is there, and on the client's clock in the next row.
            With "tuned" operations that need nothing of each other share messages: the round, the serial_bytes and the
            wait are then the first one's, the bytes each one's own.
        seconds: wall time from sharing the images to the logits, the making of correlated randomness included; sharing
            the weights and starting the processes is not in it. The sum over all queries.
        rounds: exchanges or one-way messages between the parties.
        bytes: one way, (sent + received) / 2 at the client; the dealer's traffic is not in it.
        error: largest difference to the clear logits; NaN where only labels were revealed.
        margin: least difference between an image's two highest clear logits; infinite where a network gives no
            (B, classes), but tokens, say.
        doubt: largest ratio of an image's error to its margin; from 1/2 on another class may have come out.
        agrees: whether every image's highest logit is the clear one's; without classes, whether no number of an image
            errs by more than a fiftieth of its largest or 2^-10, whichever is more.
        protocol: as asked for.
        provider: as asked for: with "TFP" this was a measurement, not a private run.
        violations: operations whose inputs leave the domain of their protocol, each with the values and the domain.
        setup: seconds from the client's start to the first secret image.
        dealing: seconds that dealing ahead took for all queries, before their clocks started; next to nothing where
            randomness was dealt along the way, which is in `seconds`.
        threads: threads per party.
        queries: the operations of every query by itself, with its number in column query.
        drift: where asked for, one row per module's result: node, layer, kind, error (largest difference to the clear
            result) and scale (its largest absolute value).
    """

    logits: torch.Tensor | None
    labels: torch.Tensor
    error: float
    margin: float
    doubt: float
    agrees: bool
    protocol: str
    provider: str
    violations: list[str]
    setup: float
    dealing: float
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
    def faithful(self) -> bool:
        """Whether the answer is the clear network's: the same classes, by logits that err well under their margins.

        And no operation left its domain.
        """
        return not self.violations and self.agrees and self.doubt <= DOUBT


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
    reveal: str = "logits",
    dealt: str = "along",
    device: str = "cpu",
    audit: Path | None = None,
    progress: Callable[[dict], None] | None = None,
) -> Result:
    """Run the whole network on secret shares, each party in an operating-system process of its own.

    Party 0 (server) gets the weights, party 1 (client) the images; with provider "TTP" party 2 deals the correlated
    randomness. With "TFP" party 0 makes it itself and could unmask everything: CrypTen's default, fit for measuring
    only. All of them are this user's on one machine: nothing is secret from who runs it.

    The parties of "tuned" have sockets that were connected before they started: nothing listens, and nobody else can
    connect. Those of "stock" meet over CrypTen's, in clear, which any user of the machine can reach: who takes a place
    there makes them wait, which nothing but `timeout` ends.

    Args:
        model: any module whose operations the protocol knows, or that `models.foreign.adopt` makes one of; it is used
            in evaluation mode and not changed.
        images: (B, C, height, width), float, normalised pixels.
        protocol: "stock", CrypTen's own functions, or "tuned", ours.
        provider: "TFP" or "TTP", who makes the correlated randomness.
        link: delays every message as this connection would; None for the bare loopback.
        timeout: seconds for everything, starting the processes included.
        meet: HOST:PORT, an address of this machine where the parties of "stock" meet; port 0 takes a free one.
        bits: fractional bits; None for the protocol's own, 16 with "stock" and 13 with "tuned". Each one more makes a
            failed truncation four times as likely: with "tuned" 1e-4 per inference of CCT-7/3x1 at 13, 1 at 20.
        batch: images in a query, in one session after another; None for all images in one query.
        check: find, on shares, values that leave the range of a "tuned" protocol; each check opens one flag.
        drift: compare every activation with the clear one; the parties give up their shares for it after the run.
        reveal: "logits", rounded exactly, or, with "tuned", the "label" alone: the place of the highest one.
        dealt: "along", while the query runs and on its clock, or, with "tuned", "ahead" of it: what a query takes whose
            correlated randomness lies ready.
        device: where each party computes: "cpu", or, with "tuned", "cuda". The processor makes streams of randomness,
            and messages pass through its memory.
        audit: a folder where each party of "tuned" writes all messages that it received, as a list of tensors.
        progress: called now and then with what the client has so far: logits and operations.

    Raises:
        ValueError: an input or a model that cannot be run, before any process starts.
        PrivateInferenceError: a party failed or time ran out; no party is left behind.
    """
    asked = Asked(protocol, provider, timeout, bits, batch, check, drift, reveal, dealt, device)
    timeout, bits, batch = asked.timeout, asked.bits, asked.batch
    if not isinstance(meet, str) or not re.fullmatch(r".+:[0-9]{1,5}", meet) or int(meet.rpartition(":")[2]) > 65535:
        raise ValueError(f"meet is {meet!r}: give HOST:PORT, such as 127.0.0.1:0")
    host, _, port = meet.rpartition(":")
    if problem := link_problem(link) or folder_problem("audit", audit):
        raise ValueError(problem)
    if progress is not None and not callable(progress):
        raise ValueError(f"progress is {shown(progress)}: give a function of a dict, or None")
    if audit and protocol != "tuned":
        raise ValueError(f"protocol {protocol!r} knows no audit: choose tuned")
    if problem := model_problem(model) or image_problem(images, config_of(model)):
        raise ValueError(problem)
    if problem := weight_problem(model.state_dict()):
        raise ValueError(problem)
    images = images.detach().cpu()
    with TRACING:  # what is traced in another thread patches every module's call
        clear = _answered(model, images)
    graph, images = network_of(model, images.shape, protocol_of(protocol)).float(), images.float()
    if problem := weight_problem(graph.state_dict()):
        raise ValueError(problem)
    with TRACING:
        violations = _violations(graph, images, protocol_of(protocol))
    size = query_size(len(images), batch)
    if size > ROOMY:
        table = estimate(model, (size, *images.shape[1:]), protocol).operations
        largest = float((table["bytes"] + table["offline_bytes"]).max())
        if problem := memory_problem(largest, 3 if provider == "TTP" else 2):
            raise ValueError(f"batch is {batch!r}: {problem}")

    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        with _writing(Path(tempfile.gettempdir())):
            kept = tempfile.TemporaryDirectory(prefix="salvit-", ignore_cleanup_errors=True)
        name = stack.enter_context(kept)
        folder = Path(name)
        with _answering(timeout):
            guard(folder, deadline)
        server, client = folder / "server", folder / "client"
        with _writing(folder):
            server.mkdir()
            client.mkdir()
        _put(graph.state_dict(), server / "weights.pt")
        _put(images, client / "images.pt")
        _put(packed_graph(deepcopy(graph)), folder / "graph.pt")
        options = [f"--graph={folder}/graph.pt", f"--provider={provider}"]
        options += [] if bits is None else [f"--bits={bits}"]
        options += [] if batch is None else [f"--batch={batch}"]
        options += [] if link is None else [f"--link={link.rtt},{link.bandwidth}"]
        options += ["--check"] if check else []
        options += [] if device == "cpu" else [f"--device={device}"]
        options += ["--ahead"] if dealt == "ahead" else []
        options += [] if reveal == "logits" else [f"--reveal={reveal}"]
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
        run_parties({role: options + inputs[role] for role in roles}, protocol, host, int(port), timeout, folder, watch)
        found = torch.load(client / "result.pt", weights_only=True)
        with TRACING:
            table = _drift(graph, images, protocol, folder) if drift else None

    queries = pd.DataFrame(found["operations"]).groupby(["query", "layer", "kind"], sort=False).sum().reset_index()
    rows = queries.drop(columns="query").groupby(["layer", "kind"], sort=False).sum().reset_index()
    rows["kind"] = pd.Categorical(rows["kind"], KINDS)
    logits = found["logits"] if reveal == "logits" else None
    labels = found["logits"][:, 0].long() if logits is None else logits.flatten(1).argmax(1)
    facts = compared(logits, labels, clear)
    violations += [f"{place}: values left the protocol's range (seen on shares)" for place in found["violations"]]
    return Result(
        logits=logits,
        labels=labels,
        operations=rows,
        **facts,
        protocol=protocol,
        provider=provider,
        violations=violations,
        setup=found["setup"],
        dealing=found["dealing"],
        threads=found["threads"],
        queries=queries,
        drift=table,
    )


def compared(logits: torch.Tensor | None, labels: torch.Tensor, clear: torch.Tensor) -> dict:
    """How a private answer compares with clear logits (B, classes), or what else a network gives, (B, ...).

    These are error, margin, doubt and agrees of `Result`.

    Without logits there is no error to see: there is doubt where the labels differ.
    """
    classes = clear.shape[1:].numel() == clear.shape[1]  # else tokens, or a map: there is no highest one to mistake
    clear = clear.flatten(1)
    margin = torch.full((len(clear),), math.inf)
    if classes and clear.shape[1] > 1:
        margin = clear.topk(2, 1).values.diff(dim=1)[:, 0].neg()
    same = labels == clear.argmax(1)
    if logits is None:
        error, doubt = math.nan, torch.where(same, 0.0, math.inf)
    else:
        errors = (logits.flatten(1) - clear).abs().amax(1).nan_to_num(math.inf, math.inf)  # (B,)
        doubt = (errors / margin).nan_to_num(0.0, math.inf)  # no error at no margin: no doubt
        same = same if classes else errors <= (NEAR * clear.abs().amax(1)).clamp(min=ROUNDED)
        error = float(errors.max())
    return {"error": error, "margin": float(margin.min()), "doubt": float(doubt.max()), "agrees": bool(same.all())}


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
    clear = _Keeping(protocol_of(protocol).rewrite(deepcopy(graph)))
    given = images[start:].float()
    with (
        torch.no_grad()
    ):  # of a network that others wrote the batch need not be the first dimension: filled up as there
        clear.run(torch.cat([given, given.new_zeros(size - len(given), *given.shape[1:])]))
    rows = []
    for node in clear.module.graph.nodes:
        if node.name not in shares[0]:
            continue
        value = torch.ones(())
        for (ours, bits), (theirs, _) in zip(*(share[node.name] for share in shares), strict=True):
            value = value * ((ours + theirs).double() / 2.0**bits)
        exact = clear.kept[node.name]
        if len(exact) == size:
            value, exact = value[: len(given)], exact[: len(given)]
        error = (value - exact).abs().max().item()
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


def _answered(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The model's own clear logits, in evaluation mode: an answer is judged by them, not by its graph's.

    Raises:
        ValueError: it cannot read the images.
    """
    twin = deepcopy(model).eval()
    first = next(itertools.chain(twin.parameters(), twin.buffers()), images)
    try:
        with torch.no_grad():
            answer = twin(images.to(first.device, first.dtype))
        if not isinstance(answer, torch.Tensor):
            raise ValueError(f"{type(model).__name__} does not return one tensor: let it return the logits alone")
        return answer.float().cpu()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"images of shape {tuple(images.shape)} do not fit the network: {reason}") from error


def _violations(graph: torch.fx.GraphModule, images: torch.Tensor, table: Protocol) -> list[str]:
    """What leaves its domain in the clear."""
    clear = DomainInterpreter(graph, table)
    with torch.no_grad():
        clear.run(images)
    return clear.violations


@contextlib.contextmanager
def _writing(path: Path):
    try:
        yield
    except OSError as error:
        raise PrivateInferenceError(f"cannot write {path} ({error.strerror}): {_ROOM}") from error


def _put(what, path: Path) -> None:
    """Write what a party reads."""
    with _writing(path):
        path.write_bytes(packed(what))


def _silence(folder: Path) -> str:
    """Why a party said nothing: where it left no word on a full disk, that is why."""
    try:
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(4096))
    except OSError as error:
        return f"(said nothing: cannot write {folder} ({error.strerror}), {_ROOM})"
    return "(said nothing)"


def run_parties(
    parties: dict[str, list[str]],
    protocol: str,
    host: str,
    port: int,
    timeout: float,
    folder: Path,
    look: Callable[[], None] | None = None,
) -> None:
    """Run one process per role to its end.

    Args:
        parties: role to its command-line options, without --meet and --protocol.
        protocol: "stock" or "tuned".
        host: address to meet at; one of this machine's. The parties of "tuned" have met already.
        port: port to meet at, 0 for a free one.
        timeout: seconds for all of it.
        folder: where the processes' logs go.
        look: called now and then while they run.

    Raises:
        PrivateInferenceError: a party failed or time ran out, with every party's last words.
    """
    deadline = time.monotonic() + timeout
    threads = max(1, (os.cpu_count() or 1) // len(parties))
    running: dict[str, Born] = {}
    given: dict[str, dict[str, socket.socket]] = {role: {} for role in parties}
    with contextlib.ExitStack() as stack:
        if protocol == "tuned":
            for ours, theirs in itertools.combinations(parties, 2):
                one, other = map(stack.enter_context, connected_pair())
                given[ours][f"--socket={theirs}="], given[theirs][f"--socket={ours}="] = one, other
        else:
            try:
                meeting = stack.enter_context(listen(host, port))
            except PartyError as error:
                raise PrivateInferenceError(f"party 0 (server): {error}") from error
            port = meeting.getsockname()[1]
            given["server"]["--listen="] = meeting
        stack.callback(_stop, running)
        for role, options in parties.items():
            words = [role, f"--meet={host}:{port}", "--leash", f"--protocol={protocol}"]
            words += [f"--timeout={min(timeout + 5, DAYS)}"]
            descriptors = {option: end.fileno() for option, end in given[role].items()}
            with _writing(folder / f"{role}.log"):
                (folder / f"{role}.log").touch()
            with _answering(timeout):
                running[role] = bear(words + options, folder, threads, deadline, descriptors)
        for end in itertools.chain.from_iterable(ends.values() for ends in given.values()):
            end.close()  # or a party's end would not close its connections
        _watch(running, deadline, timeout, folder, look)


@contextlib.contextmanager
def _answering(timeout: float):
    try:
        yield
    except Silent as error:
        silent = "the process that forks the parties did not answer"
        raise PrivateInferenceError(f"private inference took longer than {timeout:g} s: {silent}") from error


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection on loopback; nothing listens any more when they are given out."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        ours = socket.create_connection(listening.getsockname(), timeout=10)
        listening.settimeout(10)
        while True:
            theirs, address = listening.accept()
            if address == ours.getsockname():
                theirs.settimeout(None)
                ours.settimeout(None)
                return ours, theirs
            theirs.close()  # somebody else of this machine was quicker


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
        last = lines[-1].removeprefix(f"party {ROLES.index(role)} ({role}): ") if lines else _silence(folder)
        words.append(f"party {ROLES.index(role)} ({role}) {fate}: {last}")
    return "; ".join(words)


def _stop(running: dict[str, Born]) -> None:
    for process in running.values():
        if process.poll() is None:
            process.kill()
        process.wait()
        process.close()

"""One party's process: reads its own input, meets the others, runs the network, writes what it may know.

    salvit party server --meet HOST:PORT --architecture FILE --weights FILE
    salvit party client --meet HOST:PORT --architecture FILE --images FILE --result FILE
    salvit party dealer --dealer HOST:PORT
    salvit party identity --out FILE
    salvit party ... --reserve FOLDER --fill QUERIES     # correlations for later, and nothing else
    salvit party ... --reserve FOLDER                    # draws from them: no dealer is needed

The server listens on --meet for the client and the dealer on --dealer for both. Party 0, the server, alone reads the
weights; party 1, the client, alone reads the images and alone learns the logits; party 2, the dealer, sees neither. The
architecture is public: a configuration's JSON file, or a preset's name.

On different machines --protocol tuned --provider TTP is needed, and an --identity of each party's own with the
fingerprints of the others (--peer), so that nobody else can take a party's place (`rendezvous`).
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import re
import secrets
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch

from ... import __version__, workspace
from ...compat import without_compiler
from ...models.config import EFFICIENTVITS, PRESETS, Network, config_of, preset
from ...models.graph import trace
from ...models.vit import build
from .. import protocol_of
from ..asked import Asked, image_problem, query_size, weight_problem
from ..interpreter import SecretInterpreter, fingerprint
from ..links import Link
from ..protocol import PROTOCOLS, PROVIDERS, REVEALS, ROLES
from ..reserve import Reserve, ReserveError, mark_of
from ..transport import TransportError
from ..tuned.arithmetic.share import session
from . import dealer, gloo, rendezvous
from .rendezvous import PartyError

# What the parties must have alike, unless one says nothing.
ALIKE = (
    *("version", "torch", "protocol", "provider", "bits", "batch", "check", "reveal", "architecture"),
    *("ahead", "reserve", "fill"),
)


def read_architecture(path: Path) -> tuple[torch.fx.GraphModule, Network]:
    """The network's graph, and its configuration: a preset's name, or a file of JSON, which may come from anybody.

    Raises:
        PartyError: it is neither a preset nor a file of a configuration.
    """
    named = str(path) in PRESETS | EFFICIENTVITS and not path.exists()
    try:
        config = preset(str(path)) if named else config_of(json.loads(_plain(path).read_text()))
        with torch.device("meta"):
            return trace(build(config)), config
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PartyError(f"{path.name} is no configuration of a network in JSON: {_line(error)}") from error


def read_graph(path: Path) -> torch.fx.GraphModule:
    """What `packed_graph` made. It is unpickled, which runs what it holds: only for the launcher's own files."""
    saved = torch.load(path, weights_only=False)
    for node, (layer, kind) in zip(saved["graph"].graph.nodes, saved["places"], strict=True):
        node.meta["layer"], node.meta["kind"] = layer, kind
    return saved["graph"]


def packed_graph(graph: torch.fx.GraphModule) -> dict:
    """A graph without any weight. The places of its nodes go beside it: a pickled graph forgets them."""
    places = [(node.meta["layer"], node.meta["kind"]) for node in graph.graph.nodes]
    return {"graph": graph.to("meta"), "places": places}


def packed(what) -> bytes:
    """What torch.save writes: by itself, on a full disk, it speaks of anything but the disk."""
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


@contextlib.contextmanager
def _said():
    """What is wrong with a file, in the line that the workspace has for it."""
    try:
        yield
    except OSError as error:
        raise PartyError(error.strerror or str(error)) from error


def _plain(path: Path) -> Path:
    """A file that may be read; a FIFO, say, might never end."""
    with _said():
        return workspace.readable(path)


def _read(path: Path, expected: str) -> Any:
    """What torch.save wrote, of tensors alone.

    Raises:
        PartyError: it is something else.
    """
    try:
        return torch.load(_plain(path), weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, AttributeError) as error:
        raise PartyError(f"{path.name} does not hold {expected} that torch.save wrote: {_line(error)[:200]}") from error


def read_images(path: Path, config: Network | None) -> torch.Tensor:
    """The client's images, refused if fixed point cannot hold them or the network cannot read them."""
    images = _read(path, "a tensor of images")
    if problem := image_problem(images, config):
        raise PartyError(problem)
    return images


def load_weights(graph: torch.fx.GraphModule, path: Path) -> torch.fx.GraphModule:
    """The graph with the server's weights in place of its meta tensors."""
    graph = graph.to_empty(device="cpu")
    weights = _read(path, "a state dict")
    try:
        graph.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        problem = " ".join(str(error).split())
        raise PartyError(f"the weights in {path.name} do not fit the architecture: {problem[:300]}") from error
    if wrong := weight_problem(graph.state_dict()):
        raise PartyError(wrong)
    return graph


def agree(everyone: dict[str, dict], role: str) -> None:
    """Insist on equal terms.

    Args:
        everyone: each party's terms, by role.
        role: of this party.

    Raises:
        PartyError: another's terms differ from this party's.
    """
    terms = everyone[role]
    differences = [
        f"{key}: {other} has {everyone[other].get(key)}, {role} has {terms[key]}"
        for other in ROLES
        if other in everyone
        for key in ALIKE
        if everyone[other].get(key) is not None and terms[key] is not None and everyone[other][key] != terms[key]
    ]
    if differences:
        raise PartyError("the parties do not agree: " + "; ".join(differences))


def asked_for(everyone: dict[str, dict]) -> tuple[int, ...]:
    """The shape of the client's images, from its terms.

    Raises:
        PartyError: they hold none.
    """
    shape = everyone["client"].get("shape")
    if not isinstance(shape, list) or len(shape) != 4 or not all(isinstance(x, int) and x > 0 for x in shape):
        raise PartyError(f"the client's images have shape {str(shape)[:100]}: four positive numbers were expected")
    return tuple(shape)


def run(args: argparse.Namespace) -> None:
    """Play one party from its files to its result."""
    began = time.monotonic()
    deadline = began + args.timeout
    terms = {
        "version": __version__,
        "torch": torch.__version__.split("+")[0],
        "protocol": args.protocol,
        "provider": args.provider,
        "bits": None,
        "batch": None,
        "check": args.check,
        "reveal": args.reveal,
        "architecture": None,
        "shape": None,
        "ahead": None,
        "reserve": None,
        "fill": None,
    }
    for place in (args.result, args.drift, args.audit):
        if place is not None:
            with _said():
                workspace.try_out(place)
    images: torch.Tensor | None = None
    protocol = None if args.role == "dealer" else protocol_of(args.protocol)
    if protocol is not None:
        config = None
        if args.graph is None:
            graph, config = read_architecture(args.architecture)
        else:
            graph = read_graph(args.graph)
        terms["bits"] = protocol.bits if args.bits is None else args.bits
        terms["batch"] = args.batch or "all"
        terms["architecture"] = fingerprint(graph)
        terms["ahead"], terms["fill"] = args.ahead, args.fill
        if args.role == "server":
            graph = load_weights(graph, args.weights)
        elif args.fill:
            terms["shape"] = args.shape
            if problem := image_problem(torch.zeros(args.shape), config):
                raise PartyError(problem)
        else:
            images = read_images(args.images, config)
            terms["shape"] = list(images.shape)
        # What its correlations must be for. The weights' mark is the server's own business.
        dealt_for = {name: terms[name] for name in ("version", "bits", "check", "reveal", "architecture")}
        dealt_for["weights"] = mark_of(graph.state_dict()) if args.role == "server" and args.reserve else None
        if not args.reserve:
            terms["reserve"] = ""
        elif args.fill:
            args.reserve = Reserve.new(args.reserve)
            terms["reserve"] = secrets.token_hex(8) if args.role == "server" else None
        else:
            args.reserve = Reserve.opened(args.reserve)
            args.reserve.check(dealt_for)
            terms["reserve"] = args.reserve.terms.get("name")

    meeting = rendezvous if args.protocol == "tuned" else gloo
    everyone, peers = meeting.meet(args, terms, deadline)
    agree(everyone, args.role)
    shape = () if protocol is None else asked_for(everyone)  # before gloo, which would wait for a stranger
    if args.protocol == "stock":
        gloo.join(args, peers)
    elif args.role == "dealer":
        dealer.serve(peers, args.device)
    if protocol is None:
        return

    rank = ROLES.index(args.role)
    with without_compiler():  # the client's weights are on the meta device
        graph = protocol.rewrite(graph)
    if args.role == "server":
        graph = graph.to(args.device)
    network = SecretInterpreter(graph, protocol, keep=args.drift is not None)
    size = query_size(shape[0], args.batch)
    starts = range(0, shape[0], size)
    dealt_for["shape"] = [size, *shape[1:]]
    if args.reserve and not args.fill:
        args.reserve.check({"shape": dealt_for["shape"]})
        args.reserve.insist(len(starts))
    logits_so_far: list[torch.Tensor] = []
    operations: list[dict] = []
    found: dict = {"operations": operations, "threads": torch.get_num_threads(), "dealing": 0.0}
    found |= {"images": shape[0], "complete": False}
    with torch.no_grad():
        network.share_weights(rank)
        protocol.prepare(network, (size, *shape[1:]), args.fill or len(starts), rank, args, peers)
        if args.fill:
            name = str(everyone["server"].get("reserve"))
            protocol.fill(args.reserve, {"name": name, **dealt_for, "queries": args.fill})
            return protocol.leave()
        for query, start in enumerate(starts):
            begin = time.perf_counter()
            network.start()
            found["dealing"] += time.perf_counter() - begin
            found.setdefault("setup", time.monotonic() - began)
            part = None
            if images is not None:  # the last query is filled up: what the dealer supplies is for one shape
                part = images[start : start + size]
                part = torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
            logits = network.run(protocol.share_images(part, (size, *shape[1:])))
            clear = protocol.reveal_to_client(logits)
            network.count("head", "head", protocol.supplied())  # the logits' last exchange belongs to the head
            network.tell_clocks(rank)
            if clear is not None:  # this is the client
                logits_so_far.append(clear[: shape[0] - start])
                operations += [{"query": query, **row} for row in network.rows]
                _save({**found, "logits": torch.cat(logits_so_far)}, args.result)
        found |= {"violations": protocol.violations(), "complete": True}
    if args.role == "client":
        _save({**found, "logits": torch.cat(logits_so_far)}, args.result)
    if args.drift is not None:
        _save(network.kept, args.drift)
    if args.audit is not None:
        _save(session.audit, args.audit)
    protocol.leave()


def _save(what, path: Path) -> None:
    with _said():
        workspace.write(path, packed(what))


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, where argparse puts its usage before it."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"error: {' '.join(message.split())}: {self.prog} --help tells the options\n")


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _parse(argv: list[str] | None, launched: bool) -> argparse.Namespace:
    parser = _Parser(prog="salvit party", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("role", choices=ROLES, help="or identity: see salvit party identity --help")
    parser.add_argument("--meet", type=_place, metavar="HOST:PORT", help="where the server listens")
    parser.add_argument("--dealer", type=_place, metavar="HOST:PORT", help="where the dealer of tuned listens")
    parser.add_argument("--identity", type=Path, help="this party's own, from salvit party identity")
    parser.add_argument(
        "--peer", type=_peer, action="append", metavar="ROLE=FINGERPRINT", help="another party's, as it told you"
    )
    parser.add_argument("--tunnel", action="store_true", help="stock: --meet is reached through an encrypted tunnel")
    architecture = "server, client: the public architecture, a configuration in JSON or a preset's name"
    parser.add_argument("--architecture", type=Path, help=architecture)
    parser.add_argument("--weights", type=Path, help="server: a state dict")
    parser.add_argument("--images", type=Path, help="client: a tensor (B, C, height, width)")
    parser.add_argument("--result", type=Path, help="client: where to write logits and costs")
    parser.add_argument("--protocol", default="stock", choices=PROTOCOLS)
    parser.add_argument("--provider", default="TFP", choices=PROVIDERS)
    parser.add_argument("--bits", type=int, help="fractional bits (default: the protocol's)")
    parser.add_argument("--batch", type=int, help="images in a query (default: all)")
    parser.add_argument("--link", type=_link, metavar="RTT,BANDWIDTH", help="delay messages: seconds, bytes per second")
    parser.add_argument("--check", action="store_true", help="find values out of range; opens a flag each")
    parser.add_argument("--reveal", default="logits", choices=REVEALS, help="what the client may learn")
    parser.add_argument("--device", default="cpu", help="tuned: where this party computes, such as cuda")
    parser.add_argument("--ahead", action="store_true", help="tuned: all of a query is dealt before its clock starts")
    parser.add_argument("--reserve", type=Path, metavar="FOLDER", help="tuned: correlations that were dealt before")
    parser.add_argument("--fill", type=_count, default=0, metavar="QUERIES", help="fill the --reserve, and end")
    parser.add_argument("--shape", type=_shape, metavar="B,C,H,W", help="client: with --fill, of a query's images")
    parser.add_argument("--audit", type=Path, help="write all messages that this party receives here")
    parser.add_argument("--drift", type=Path, help="write this party's share of every activation here")
    patience = "seconds until this party gives up: with stock, all that ends a wait for a peer that falls silent"
    parser.add_argument("--timeout", type=float, default=600.0, help=patience)
    parser.set_defaults(graph=None, listen=None, socket=None, leash=False)
    if launched:  # nobody's but the launcher's
        parser.add_argument("--graph", type=Path, help="a graph instead of --architecture")
        parser.add_argument("--listen", type=int, help="server of stock: a socket that already listens on --meet")
        parser.add_argument("--socket", type=_socket, action="append", help="tuned: a socket connected to a role")
        parser.add_argument("--leash", action="store_true", help="end when standard input closes")
    args = parser.parse_args(argv)
    args.peer, args.socket = dict(args.peer or []), dict(args.socket or [])
    needs = [] if args.role == "dealer" or args.graph is not None else ["architecture"]
    inputs = {"server": ["weights"], "client": ["shape"] if args.fill else ["images", "result"], "dealer": []}
    needs += inputs[args.role]
    needs += ["dealer"] if "dealer" in rendezvous.roles(args) and args.protocol == "tuned" and not launched else []
    needs += [] if args.role == "dealer" and args.protocol == "tuned" else ["meet"]
    for name in needs:
        if getattr(args, name) is None:
            parser.error(f"the {args.role} needs --{name}")
    if args.reveal == "label" and args.protocol == "stock":
        parser.error("--reveal label needs --protocol tuned: CrypTen opens the logits")
    try:
        options = ("protocol", "provider", "timeout", "bits", "batch", "check", "reveal", "device")
        Asked(**{name: getattr(args, name) for name in options}, dealt="ahead" if args.ahead else "along")
    except ValueError as error:
        parser.error(str(error))
    if args.reserve and args.protocol == "stock":
        parser.error(f"--reserve {args.reserve}: stock deals as it goes, give --protocol tuned")
    if args.fill and not args.reserve:
        parser.error("--fill needs --reserve, the folder that it fills")
    if args.reserve and args.provider == "TFP":
        parser.error("a reserve is filled by a dealer: give --provider TTP to all parties")
    if args.role == "dealer" and (args.reserve or args.fill):
        parser.error("the dealer keeps nothing: give --reserve and --fill to the server and the client")
    if args.role == "dealer" and args.provider == "TFP":
        parser.error("a dealer deals under provider TTP alone: give --provider TTP to all parties")
    return args


def _place(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HOST:PORT, such as 127.0.0.1:29500")
    return host, int(port)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of queries, 1 to 1000000")
    return int(text)


def _shape(text: str) -> list[int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected B,C,H,W, such as 1,3,32,32")
    return [int(part) for part in parts]


def _peer(text: str) -> tuple[str, str]:
    role, _, mark = text.partition("=")
    mark = mark.replace(":", "").lower()
    if role not in ROLES or len(mark) != 64 or set(mark) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected ROLE=FINGERPRINT, the 64 digits that identity printed")
    return role, mark


def _socket(text: str) -> tuple[str, int]:
    role, _, number = text.partition("=")
    return role, int(number)


def _link(text: str) -> Link:
    try:
        rtt, bandwidth = map(float, text.split(","))
        return Link(rtt, bandwidth)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected RTT,BANDWIDTH, such as 0.04,44e6") from error


def _identity(argv: list[str]) -> None:
    parser = _Parser(
        prog="salvit party identity",
        description="Make this party's key and certificate, and print the fingerprint that the others give as --peer.",
    )
    parser.add_argument("--out", type=Path, required=True, help="a new file, for this user alone: keep it secret")
    try:
        print(rendezvous.create(parser.parse_args(argv).out))
    except PartyError as error:
        sys.exit(f"error: {error}")


def _name(name: str) -> str:
    """Have Linux list this process under another name; the one it had."""
    had, comm = "", Path("/proc/self/comm")
    with contextlib.suppress(OSError):
        had = comm.read_text().strip()
        comm.write_text(name)
    return had


def _leash() -> None:
    """End with the process that started this one, however that ends."""
    # The bare file descriptor: Python's own buffer would hold a lock that the interpreter needs to shut down.
    while os.read(0, 1):
        pass
    os._exit(2)


def _give_up(who: str, seconds: float, over: threading.Event) -> None:
    """A thread, because the main one may be waiting in gloo for a peer that will never answer."""
    if over.wait(seconds + 2):  # whoever can say better what it waits for speaks first
        return
    todo = "see whether the other party still computes, or raise --timeout"
    print(f"{who}: not done after {seconds:.0f} s: {todo}", file=sys.stderr, flush=True)
    os._exit(3)


def main(argv: list[str] | None = None, launched: bool = False) -> None:
    """Run one party; whatever stops it ends in one line on standard error and a non-zero status.

    Args:
        argv: the command line.
        launched: by `launch.infer` of this machine, which may give it open sockets and a pickled graph.
    """
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["identity"]:
        return _identity(words[1:])
    args = _parse(words, launched)
    who = f"party {ROLES.index(args.role)} ({args.role})"
    named = _name(f"{args.role}:{(args.meet or args.dealer)[1]}")
    if args.leash:
        threading.Thread(target=_leash, daemon=True).start()
    over = threading.Event()  # whoever called this may go on after it: then neither time nor name may stay behind
    threading.Thread(target=_give_up, args=(who, args.timeout, over), daemon=True).start()
    try:
        if not launched:
            rendezvous.check(args)
        run(args)
    except (PartyError, ReserveError, TransportError, OSError) as error:
        sys.exit(f"{who}: {error}")
    except Exception as error:
        text = _line(error)
        if isinstance(error, RuntimeError) and ("peer" in text or "gloo" in text):
            sys.exit(f"{who}: lost the connection to the other party ({text})")
        traceback.print_exc()
        sys.exit(f"{who}: {type(error).__name__}: {text}")
    finally:
        over.set()
        _name(named)


if __name__ == "__main__":
    main()

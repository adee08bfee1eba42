"""One party's process: reads its own input, meets the others, runs the network, writes what it may know.

    python -m salvit_core.private.party server --meet HOST:PORT --architecture FILE --weights FILE
    python -m salvit_core.private.party client --meet HOST:PORT --architecture FILE --images FILE --result FILE
    python -m salvit_core.private.party dealer --meet HOST:PORT          (provider TTP only)

HOST:PORT is where the server listens; the other parties connect to it. Party 0, the server, alone reads the weights;
party 1, the client, alone reads the images and alone learns the logits; party 2, the dealer, sees neither. The
architecture is public: a configuration's JSON file, or a graph written by `launch.infer` on the same machine.
"""

import argparse
import contextlib
import io
import json
import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import crypten
import crypten.communicator as comm
import psutil
import torch
import torch.distributed as dist

from .. import __version__, records
from ..cct import config_of
from ..compat import without_compiler
from ..graph import trace
from ..vit import build
from . import stock, tuned
from .dealing import server_of_dealer
from .interpreter import SecretInterpreter, fingerprint
from .network import Link
from .shares import BITS

ROLES = ("server", "client", "dealer")
PROVIDERS = ("TFP", "TTP")
PROTOCOLS = {"stock": stock, "tuned": tuned}


class PartyError(Exception):
    """What stops a party, in one line."""


def read_architecture(path: Path) -> torch.fx.GraphModule:
    """The network's graph from a configuration in JSON or from a file that `write_architecture` made.

    Only the JSON form is fit for a file that another host sent: the other is unpickled.
    """
    if path.suffix == ".json":
        with torch.device("meta"):
            return trace(build(config_of(json.loads(path.read_text()))))
    saved = torch.load(path, weights_only=False)
    for node, (layer, kind) in zip(saved["graph"].graph.nodes, saved["places"], strict=True):
        node.meta["layer"], node.meta["kind"] = layer, kind
    return saved["graph"]


def write_architecture(graph: torch.fx.GraphModule, path: Path) -> None:
    """Write a graph without any weight. The places of its nodes go beside it: a pickled graph forgets them."""
    places = [(node.meta["layer"], node.meta["kind"]) for node in graph.graph.nodes]
    torch.save({"graph": graph.to("meta"), "places": places}, path)


def read_images(path: Path) -> torch.Tensor:
    """The client's images, refused if fixed point cannot hold them."""
    images = torch.load(path, weights_only=True)
    if problem := image_problem(images):
        raise PartyError(problem)
    return images


def image_problem(images) -> str | None:
    """Why these images cannot be shared, in one line, or None."""
    if not isinstance(images, torch.Tensor) or images.dtype not in (torch.float32, torch.float64):
        kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        return f"images are {kind}: give a float32 tensor of normalised pixels"
    if images.dim() != 4 or images.shape[0] < 1:
        return f"images have shape {tuple(images.shape)}: give (B, C, height, width) with at least one image"
    if not images.isfinite().all():
        return f"images hold {int((~images.isfinite()).sum())} NaN or infinite values: clean them first"
    if images.abs().max() > 1024:
        return f"images reach {images.abs().max():.3g}: fixed point needs values within 1024, so normalise the pixels"
    return None


def load_weights(graph: torch.fx.GraphModule, path: Path) -> torch.fx.GraphModule:
    """The graph with the server's weights in place of its meta tensors."""
    graph = graph.to_empty(device="cpu")
    try:
        graph.load_state_dict(torch.load(path, weights_only=True))
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise PartyError(f"the weights in {path.name} do not fit the architecture: {problem[:300]}") from error
    return graph


def listen(host: str, port: int) -> socket.socket:
    """A listening socket for the rendezvous.

    Raises:
        PartyError: the port is taken, or the address is not this machine's.
    """
    meeting = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    meeting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        meeting.bind((host, port))
    except OSError as error:
        meeting.close()
        problem = f"cannot listen on {host}:{port} ({error.strerror})"
        raise PartyError(f"{problem}: choose another HOST:PORT to meet at") from error
    meeting.listen()
    return meeting


def meet(args: argparse.Namespace, deadline: float) -> dist.TCPStore:
    """The key-value store through which the parties find each other; the server hosts it."""
    host, port = args.host, args.port
    if args.role == "server":
        descriptor = args.listen if args.listen is not None else listen(host, port).detach()
        return dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor, use_libuv=True
        )
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        except OSError as error:
            if time.monotonic() > deadline:
                raise PartyError(f"no server answered at {host}:{port} ({error}): start it first") from error
            time.sleep(0.05)


def agree(store: dist.TCPStore, role: str, terms: dict, deadline: float) -> dict:
    """Exchange terms with the other parties and insist on equal ones; returns the client's.

    Raises:
        PartyError: a party did not come, or its terms differ.
    """
    present = ROLES if terms["provider"] == "TTP" else ROLES[:2]
    store.set(role, json.dumps(terms))
    everyone = {}
    for other in present:
        try:
            store.wait([other], timedelta(seconds=max(1.0, deadline - time.monotonic())))
        except (dist.DistStoreError, RuntimeError) as error:
            raise PartyError(f"the {other} did not come in time") from error
        everyone[other] = json.loads(store.get(other))
    differences = [
        f"{key}: {other} has {theirs[key]}, {role} has {terms[key]}"
        for other, theirs in everyone.items()
        for key in ("version", "torch", "protocol", "provider", "bits", "batch", "check", "architecture")
        if theirs[key] is not None and terms[key] is not None and theirs[key] != terms[key]
    ]
    # The server hosts the store: it may leave only when all have read what it holds.
    store.set(f"{role} has read", "")
    if role == "server":
        store.wait([f"{other} has read" for other in present], timedelta(seconds=10))
    if differences:
        raise PartyError("the parties do not agree: " + "; ".join(differences))
    return everyone["client"]


def _interface(host: str, port: int) -> str | None:
    """The network interface that reaches HOST:PORT, for gloo, which would otherwise guess from the host's name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        local = probe.getsockname()[0]
    wanted = "127.0.0.1" if local.startswith("127.") else local
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == wanted for address in addresses):
            return name
    return None


def start_crypten(args: argparse.Namespace, store: dist.TCPStore) -> None:
    """Join the parties' process group over the store that they met at. In the dealer this call serves until the end."""
    os.environ.update(
        RANK=str(ROLES.index(args.role)), WORLD_SIZE="2", DISTRIBUTED_BACKEND="gloo", RENDEZVOUS="salvit://"
    )
    if interface := _interface(args.host, args.port):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    parties = 3 if args.provider == "TTP" else 2

    def rendezvous(url, timeout=None, **_):
        yield store, ROLES.index(args.role), parties

    dist.register_rendezvous_handler("salvit", rendezvous)
    crypten.cfg.mpc.provider = args.provider
    if args.protocol == "stock" and args.bits is not None:
        crypten.cfg.encoder.precision_bits = args.bits
    crypten.cfg.communicator.verbose = True  # without it CrypTen counts neither rounds nor bytes
    if args.role == "dealer":
        (server_of_dealer() if args.protocol == "tuned" else crypten.mpc.provider.TTPServer)()
    else:
        crypten.init()


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
        "architecture": None,
        "shape": None,
    }
    if args.role != "dealer":
        graph = read_architecture(args.architecture)
        own = BITS if args.protocol == "tuned" else crypten.cfg.encoder.precision_bits
        terms["bits"] = own if args.bits is None else args.bits
        terms["batch"] = args.batch or "all"
        terms["architecture"] = fingerprint(graph)
        if args.role == "server":
            graph = load_weights(graph, args.weights)
        else:
            images = read_images(args.images)
            terms["shape"] = list(images.shape)

    store = meet(args, deadline)
    shape = agree(store, args.role, terms, deadline)["shape"]
    start_crypten(args, store)
    if args.role == "dealer":
        return

    protocol, rank = PROTOCOLS[args.protocol], ROLES.index(args.role)
    with without_compiler():  # the client's weights are on the meta device
        graph = protocol.rewrite(graph)
    network = SecretInterpreter(graph, protocol, keep=args.drift is not None)
    size = args.batch or shape[0]
    found = {"logits": [], "operations": [], "threads": torch.get_num_threads()}
    with torch.no_grad(), crypten.no_grad():
        network.share_weights()
        protocol.prepare(network, (size, *shape[1:]), rank, args)
        for query, start in enumerate(range(0, shape[0], size)):
            network.start()
            found.setdefault("setup", time.monotonic() - began)
            part = None
            if args.role == "client":  # the last query is filled up: what the dealer supplies is for one shape
                part = images[start : start + size]
                part = torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
            logits = network.run(protocol.share_images(part, (size, *shape[1:])))
            clear = protocol.reveal_to_client(logits)
            network.count("head", "head")  # the logits' last exchange belongs to the head
            network.agree_on_offline()
            if args.role == "client":
                found["logits"].append(clear[: shape[0] - start])
                found["operations"] += [{"query": query, **row} for row in network.rows]
                _save({**found, "logits": torch.cat(found["logits"])}, args.result)
        found["violations"] = protocol.violations()
    if args.role == "client":
        _save({**found, "logits": torch.cat(found["logits"])}, args.result)
    if args.drift is not None:
        _save(network.kept, args.drift)
    if args.audit is not None:
        _save(protocol.session.audit, args.audit)
    comm.get().barrier()
    crypten.uninit()


def _save(what, path: Path) -> None:
    packed = io.BytesIO()  # torch.save to a full disk speaks of anything but the disk
    torch.save(what, packed)
    try:
        records.write(path, lambda file: file.write(packed.getbuffer()))
    except OSError as error:
        raise PartyError(error.strerror) from error


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="salvit_core.private.party", description=__doc__.splitlines()[0])
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("--meet", required=True, metavar="HOST:PORT", help="where the server listens")
    parser.add_argument("--architecture", type=Path, help="server, client: the public architecture")
    parser.add_argument("--weights", type=Path, help="server: a state dict")
    parser.add_argument("--images", type=Path, help="client: a tensor (B, C, height, width)")
    parser.add_argument("--result", type=Path, help="client: where to write logits and costs")
    parser.add_argument("--protocol", default="stock", choices=PROTOCOLS)
    parser.add_argument("--provider", default="TFP", choices=PROVIDERS)
    parser.add_argument("--bits", type=int, help="fractional bits (default: the protocol's)")
    parser.add_argument("--batch", type=int, help="images in a query (default: all)")
    parser.add_argument("--link", type=_link, metavar="RTT,BANDWIDTH", help="delay messages: seconds, bytes per second")
    parser.add_argument("--check", action="store_true", help="find values out of range; opens a flag each")
    parser.add_argument("--audit", type=Path, help="write all messages that this party receives here")
    parser.add_argument("--drift", type=Path, help="write this party's share of every activation here")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds until this party gives up")
    parser.add_argument("--listen", type=int, help="server: an inherited socket that already listens on --meet")
    parser.add_argument("--leash", action="store_true", help="end when standard input closes")
    args = parser.parse_args(argv)
    needs = {"server": ("architecture", "weights"), "client": ("architecture", "images", "result"), "dealer": ()}
    for name in needs[args.role]:
        if getattr(args, name) is None:
            parser.error(f"the {args.role} needs --{name}")
    host, _, port = args.meet.rpartition(":")
    if not host or not port.isdigit():
        parser.error(f"--meet {args.meet!r}: expected HOST:PORT, such as 127.0.0.1:29500")
    args.host, args.port = host, int(port)
    return args


def _link(text: str) -> Link:
    return Link(*map(float, text.split(",")))


def _leash() -> None:
    """End with the process that started this one, however that ends."""
    # The bare file descriptor: Python's own buffer would hold a lock that the interpreter needs to shut down.
    while os.read(0, 1):
        pass
    os._exit(2)


def _give_up(who: str, seconds: float) -> None:
    """A thread, because the main one may be waiting in gloo for a peer that will never answer."""
    time.sleep(seconds)
    print(f"{who}: not done after {seconds:.0f} s", file=sys.stderr, flush=True)
    os._exit(3)


def main(argv: list[str] | None = None) -> None:
    """Run one party; whatever stops it ends in one line on standard error and a non-zero status."""
    args = _parse(argv)
    who = f"party {ROLES.index(args.role)} ({args.role})"
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"{args.role}:{args.port}")  # what Linux lists it as
    if args.leash:
        threading.Thread(target=_leash, daemon=True).start()
    threading.Thread(target=_give_up, args=(who, args.timeout), daemon=True).start()
    try:
        run(args)
    except PartyError as error:
        sys.exit(f"{who}: {error}")
    except OSError as error:
        sys.exit(f"{who}: {error}")
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, RuntimeError) and ("peer" in text or "gloo" in text):
            sys.exit(f"{who}: lost the connection to the other party ({text})")
        traceback.print_exc()
        sys.exit(f"{who}: {type(error).__name__}: {text}")


if __name__ == "__main__":
    main()

"""How the parties of `stock` meet: a key-value store that the server hosts, and CrypTen's process group over gloo.

Both are in clear and open to whoever reaches their ports: fit for one machine, or for a tunnel of the user's own. What
is no message of the store or of gloo is dropped there; who takes a peer's place and says nothing is to gloo a peer that
still computes, so that only the party's own time-out ends the wait.
"""

import json
import os
import socket
import time
from argparse import Namespace
from datetime import timedelta

import psutil
import torch.distributed as dist

from ..protocol import ROLES
from .rendezvous import PartyError, listen


def meet(args: Namespace, terms: dict, deadline: float) -> tuple[dict[str, dict], dist.TCPStore]:
    """Tell the other parties the terms: everybody's terms by role, and the store.

    Raises:
        PartyError: a party did not come.
    """
    store = _store(args, deadline)
    present = ROLES if args.provider == "TTP" else ROLES[:2]
    store.set(args.role, json.dumps(terms))
    everyone = {}
    for other in present:
        try:
            store.wait([other], timedelta(seconds=max(1.0, deadline - time.monotonic())))
        except (dist.DistStoreError, RuntimeError) as error:
            raise PartyError(f"the {other} did not come in time") from error
        try:
            everyone[other] = json.loads(store.get(other))
        except ValueError as error:
            raise PartyError(f"the {other} sent no terms: it must be of this version") from error
        if not isinstance(everyone[other], dict):
            raise PartyError(f"the {other} sent no terms: it must be of this version")
    # The server hosts the store: it may leave only when all have read what it holds.
    store.set(f"{args.role} has read", "")
    if args.role == "server":
        store.wait([f"{other} has read" for other in present], timedelta(seconds=10))
    return everyone, store


def _store(args: Namespace, deadline: float) -> dist.TCPStore:
    host, port = args.meet
    if args.role == "server":
        descriptor = args.listen if args.listen is not None else listen(host, port).detach()
        return dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor, use_libuv=True
        )
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise PartyError(f"no server answered at {host}:{port} ({error}): start it first") from error
            time.sleep(0.05)


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


def join(args: Namespace, store: dist.TCPStore) -> None:
    """Join the parties' process group over the store that they met at. In the dealer this call serves until the end."""
    from ..stock import crypten  # seconds to import, and the parties of `tuned` do without

    os.environ.update(
        RANK=str(ROLES.index(args.role)), WORLD_SIZE="2", DISTRIBUTED_BACKEND="gloo", RENDEZVOUS="salvit://"
    )
    if interface := _interface(*args.meet):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    parties = 3 if args.provider == "TTP" else 2

    def rendezvous(url, timeout=None, **_):
        yield store, ROLES.index(args.role), parties

    dist.register_rendezvous_handler("salvit", rendezvous)
    crypten.cfg.mpc.provider = args.provider
    if args.bits is not None:
        crypten.cfg.encoder.precision_bits = args.bits
    crypten.cfg.communicator.verbose = True  # without it CrypTen counts neither rounds nor bytes
    if args.role == "dealer":
        crypten.mpc.provider.TTPServer()
    else:
        crypten.init()
        crypten.CrypTensor.set_grad_enabled(False)

"""How parties meet: who may be who is told beforehand, by the fingerprints of their certificates.

The server listens for the client, the dealer for both. Each end of a new connection first shows its certificate in
clear; whoever does not show one of the expected fingerprints is turned away. Then both make TLS 1.3 and trust exactly
that certificate, so that each end has proved that it holds the key. Nobody else can take a party's place, read or alter
what is sent; who listens on the way learns the certificates, the sizes and the times of messages.

A stranger can cost the listening party a thread for a few seconds and nothing more: it goes on waiting for the right
one, and stops listening once all have come.

Without identities, which `check` allows on loopback alone, a role's name stands for the certificate and nothing is
encrypted: every user of the machine could take a party's place.
"""

import contextlib
import datetime
import hashlib
import ipaddress
import os
import queue
import socket
import ssl
import struct
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from ..protocol import ROLES
from ..transport import Channel

LARGEST = 4096  # bytes of a certificate that is shown
PATIENCE = 5.0  # seconds for a stranger to show who it is
CROWD = 64  # connections that are looked at at once; the oldest goes when one more comes
YEARS = 20  # until a certificate ends


class PartyError(Exception):
    """What stops a party, in one line."""


# Identities


def create(path: Path) -> str:
    """Write a new key and its self-signed certificate into a file for this user alone; returns the fingerprint.

    Raises:
        PartyError: the file is there, or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "salvit party")])
    begin = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)  # clocks differ
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(begin).not_valid_after(begin + datetime.timedelta(days=365 * YEARS))
    certificate = builder.sign(key, None)
    packed = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(packed + certificate.public_bytes(serialization.Encoding.PEM))
    except FileExistsError as error:
        raise PartyError(f"{path} is there already: an identity is never overwritten, name another file") from error
    except OSError as error:
        raise PartyError(f"cannot write {path} ({error.strerror})") from error
    return fingerprint(certificate.public_bytes(serialization.Encoding.DER))


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate's DER, in hex."""
    return hashlib.sha256(certificate).hexdigest()


def _certificate(path: Path) -> bytes:
    """The DER of an identity's certificate."""
    try:
        if path.stat().st_mode & 0o077:
            raise PartyError(f"identity {path} can be read by others: chmod 600 {path}")
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise PartyError(f"cannot read identity {path} ({error.strerror})") from error
    except ValueError as error:
        raise PartyError(f"{path} is no identity: make one with salvit party identity --out {path}") from error
    return found.public_bytes(serialization.Encoding.DER)


# What may be asked for


def check(args: Namespace) -> None:
    """Refuse what would not be private between these addresses.

    Raises:
        PartyError: says why, and what to run.
    """
    addresses = [place for place in (args.meet, args.dealer) if place is not None]
    far = [f"{host}:{port}" for host, port in addresses if not _loopback(host)]
    if args.protocol == "stock" and args.identity is not None:
        stock = "stock sends over CrypTen's connections, which know no identities"
        raise PartyError(f"--identity {args.identity}: {stock}: choose --protocol tuned")
    if args.protocol == "tuned" and args.tunnel:
        raise PartyError("--tunnel is for stock: tuned makes TLS of its own, give --identity and --peer")
    if (far or args.tunnel) and args.provider == "TFP":
        where = far[0] if far else "the other end of the tunnel"
        raise PartyError(
            f"provider TFP is for one machine and {where} is another: the server would hold both keys and could unmask "
            "the client's images; give --provider TTP to both, and on a third machine run salvit party dealer"
        )
    if far and args.protocol == "stock" and not args.tunnel:
        raise PartyError(
            f"stock sends everything in clear and {far[0]} is not this machine: choose --protocol tuned, or say "
            "--tunnel if that address is reached through an encrypted tunnel of your own"
        )
    if args.protocol == "tuned" and args.identity is None and (far or args.peer):
        others = " ".join(f"--peer {role}=FINGERPRINT" for role in _others(args))
        raise PartyError(
            f"{far[0] if far else '--peer'} needs identities: run salvit party identity --out {args.role}.pem, tell "
            f"the others the fingerprint that it prints, and give --identity {args.role}.pem {others}"
        )
    if args.identity is not None:
        if missing := [role for role in _others(args) if role not in args.peer]:
            raise PartyError(
                f"nobody knows the {missing[0]}: give --peer {missing[0]}=FINGERPRINT, which salvit party identity "
                "printed there"
            )
        if len(set(args.peer.values())) < len(args.peer):
            raise PartyError("two peers have one fingerprint: each party needs an identity of its own")
        if fingerprint(_certificate(args.identity)) in args.peer.values():
            raise PartyError(f"{args.identity} is a peer's identity, too: each party needs one of its own")


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name may be anybody's
        return False


def roles(args: Namespace) -> tuple[str, ...]:
    """Who takes part: a dealer where one must deal now."""
    return ROLES if args.provider == "TTP" and (args.fill or not args.reserve) else ROLES[:2]


def _others(args: Namespace) -> list[str]:
    return [role for role in roles(args) if role != args.role]


# Meeting


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        PartyError: the port is taken, or the address is not this machine's.
    """
    meeting = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    meeting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        meeting.bind((host, port))
    except (OSError, OverflowError) as error:
        meeting.close()
        problem = f"cannot listen on {host}:{port} ({getattr(error, 'strerror', error)})"
        raise PartyError(f"{problem}: choose another HOST:PORT to meet at") from error
    meeting.listen(1024)
    return meeting


def meet(args: Namespace, terms: dict, deadline: float) -> tuple[dict[str, dict], dict[str, Channel]]:
    """Connect with the other parties and tell each other the terms: everybody's terms and the channels, by role.

    Sockets that the launcher connected (`args.socket`) are taken as they are: nobody else was ever connected to them.

    Raises:
        PartyError: a party did not come, or is another than was told.
        TransportError: a party left.
    """
    if args.socket:
        connected = {role: socket.socket(fileno=number) for role, number in args.socket.items()}
    else:
        connected = _connected(args, deadline)
    channels = {role: Channel(connected[role], role, deadline) for role in _others(args)}
    everyone = {args.role: terms}
    for channel in channels.values():
        channel.say(terms)
    for role, channel in channels.items():
        everyone[role] = channel.hear()
        if not isinstance(everyone[role], dict):
            raise PartyError(f"the {role} sent no terms: it must be of this version")
    return everyone, channels


def _connected(args: Namespace, deadline: float) -> dict[str, socket.socket]:
    """Sockets to all other parties: the dealer waits for both, the client asks both, the server does one of each."""
    me = _Me(args)
    others = _others(args)
    found: dict[str, socket.socket] = {}
    listening = {"server": (args.meet, ["client"]), "dealer": (args.dealer, ["server", "client"])}
    with contextlib.ExitStack() as stack:
        place, awaited = listening.get(args.role, (None, []))
        door = None
        if place is not None:
            door = stack.enter_context(_Door(listen(*place), me, awaited))
        for role in others:
            if role not in awaited:
                found[role] = me.ask(role, args.meet if role == "server" else args.dealer, deadline)
        if door is not None:
            found |= door.all(deadline)
    return found


class _Refused(Exception):
    """A connection that is not the right one."""


class _Me:
    """This party: what it shows, whom it knows."""

    def __init__(self, args: Namespace):
        self.role, self.identity = args.role, args.identity
        if args.identity is None:
            self.shown = args.role.encode()
            self.known = {fingerprint(role.encode()): role for role in _others(args)}
        else:
            self.shown = _certificate(args.identity)
            self.known = {args.peer[role]: role for role in _others(args)}

    def greet(self, connection: socket.socket, awaited: list[str], asking: bool) -> tuple[str, socket.socket]:
        """Show who this is, look who that is, and make TLS.

        Raises:
            _Refused: it is not one of those who are awaited, or it refused this party.
            OSError: it left or was silent.
        """
        deadline = time.monotonic() + PATIENCE
        connection.settimeout(PATIENCE)
        connection.sendall(struct.pack("!H", len(self.shown)) + self.shown)
        (size,) = struct.unpack("!H", _exactly(connection, 2, deadline))
        if not 0 < size <= LARGEST:
            raise _Refused("it showed no certificate")
        shown = _exactly(connection, size, deadline)
        role = self.known.get(fingerprint(shown))
        right = role in awaited
        connection.sendall(b"\x01" if right else b"\x00")
        if role is None or not right:
            what = f"a certificate with fingerprint {fingerprint(shown)}" if self.identity else "another role"
            raise _Refused(f"it showed {what}, expected {self._expected(awaited)}")
        if _exactly(connection, 1, deadline) != b"\x01":
            raise _Refused(f"the {role} does not know this {self.role}, whose fingerprint is {fingerprint(self.shown)}")
        if self.identity is None:
            return role, connection
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if asking else ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=shown)  # this one and no other
        context.load_cert_chain(self.identity)
        if not asking:
            context.num_tickets = 0  # nobody would read them; unread, they would turn the end into a reset
        secured = context.wrap_socket(connection, server_side=not asking)
        if secured.getpeercert(binary_form=True) != shown:
            raise _Refused("its TLS certificate is not the one that it showed")
        return role, secured

    def _expected(self, awaited: list[str]) -> str:
        said = [mark if self.identity else role for mark, role in self.known.items() if role in awaited]
        return " or ".join(said)

    def ask(self, role: str, place: tuple[str, int], deadline: float) -> socket.socket:
        """Connect to a party that listens, as soon as it does.

        Raises:
            PartyError: nobody answered in time, or another did.
        """
        where = f"{place[0]}:{place[1]}"
        while True:
            try:
                connection = socket.create_connection(place, timeout=5)
                try:
                    _, secured = self.greet(connection, [role], asking=True)
                    _exactly(secured, 1, time.monotonic() + PATIENCE)  # it has taken this connection
                    return secured
                except BaseException:
                    connection.close()
                    raise
            except _Refused as error:
                raise PartyError(f"{where} is not the {role} that was told: {error}") from error
            except (OSError, OverflowError) as error:
                if time.monotonic() > deadline:
                    raise PartyError(f"no {role} answered at {where} ({error}): start it first") from error
                time.sleep(0.05)


class _Door:
    """Listens, looks at each who comes in a thread of its own, and keeps those who are awaited."""

    def __init__(self, listening: socket.socket, me: _Me, awaited: list[str]):
        self.listening, self.me, self.awaited = listening, me, awaited
        self.came: queue.SimpleQueue = queue.SimpleQueue()
        self.crowd: dict[socket.socket, None] = {}
        self.lock = threading.Lock()
        self.turned: dict[str, int] = {}
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.listening.close()
        with self.lock:
            for connection in self.crowd:
                _end(connection)

    def all(self, deadline: float) -> dict[str, socket.socket]:
        """The sockets of all who are awaited, by role.

        Raises:
            PartyError: one did not come in time; with what was turned away.
        """
        found: dict[str, socket.socket] = {}
        while missing := [role for role in self.awaited if role not in found]:
            try:
                role, connection = self.came.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                turned = "; ".join(f"{reason} ({count} times)" for reason, count in self.turned.items())
                raise PartyError(
                    f"the {missing[0]} did not come in time" + (f"; turned away: {turned}" if turned else "")
                ) from None
            if role in found:  # it lost its first connection and came again
                found[role].close()
            found[role] = connection
        return found

    def _accept(self) -> None:
        for connection in _accepted(self.listening):
            handle = connection.dup()  # TLS takes the socket itself away
            with self.lock:
                full = len(self.crowd) >= CROWD
                if full:
                    oldest = next(iter(self.crowd))
                    _end(oldest)
                    del self.crowd[oldest]
                self.crowd[handle] = None
            threading.Thread(target=self._look, args=(connection, handle), daemon=True).start()
            if full:
                time.sleep(0.002)  # the right one needs an instant, and is then not the oldest

    def _look(self, connection: socket.socket, handle: socket.socket) -> None:
        try:
            role, secured = self.me.greet(connection, self.awaited, asking=False)
            with self.lock:
                if handle not in self.crowd:
                    raise _Refused("too many came at once")
                del self.crowd[handle]
            secured.sendall(b"\x01")
            self.came.put((role, secured))
        except (_Refused, OSError) as error:
            reason = str(error) if isinstance(error, _Refused) else "it said nothing of use"
            with self.lock:
                if reason in self.turned or len(self.turned) < 5:  # reasons hold what strangers send
                    self.turned[reason] = self.turned.get(reason, 0) + 1
                self.crowd.pop(handle, None)
            connection.close()
        finally:
            with self.lock:
                handle.close()


def _accepted(listening: socket.socket) -> Iterator[socket.socket]:
    while True:
        try:
            yield listening.accept()[0]
        except OSError:
            if listening.fileno() < 0:
                return
            time.sleep(0.05)  # no descriptors left, or a connection that ended before it was looked at


def _end(connection: socket.socket) -> None:
    """Wake whoever reads from it; that thread closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    whole = b""
    while len(whole) < size:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        part = connection.recv(size - len(whole))
        if not part:
            raise ConnectionError("it closed")
        if time.monotonic() > deadline:
            raise TimeoutError("it was too slow")
        whole += part
    return whole

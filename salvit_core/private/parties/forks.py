"""Forks the parties' processes from one that has imported what they need: seconds less for every private inference.

    python -m salvit_core.private.parties.forks DESCRIPTOR

The nursery holds no weights, no images and no keys; what forks from it is a process of its own. It serves the process
that started it, over the socket with this descriptor, and ends with it: however that ends, the nursery then removes
the folders in which it had put weights and images.
"""

import atexit
import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path


class Silent(Exception):
    """The nursery does not answer in time."""


class Born:
    """One process forked by the nursery, as `subprocess.Popen` would show it."""

    def __init__(self, status: int, leash: int):
        self._status, self._leash = status, leash
        self._said = b""
        os.set_blocking(status, False)

    def listen(self, lines: int, deadline: float | None = None) -> list[int]:
        """Wait for what is said of the process: its number, then its exit status; fewer if nobody is left to say it.

        Raises:
            Silent: the deadline passed, on `time.monotonic`.
        """
        os.set_blocking(self._status, True)
        while self._said.count(b"\n") < lines:
            if deadline is not None and not _readable(self._status, deadline - time.monotonic()):
                raise Silent
            if not (part := os.read(self._status, 64)):
                break
            self._said += part
        os.set_blocking(self._status, False)
        return [int(word) for word in self._said.split()]

    def poll(self) -> int | None:
        """The exit status, that of a signal negative, or None while it runs."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._status, 64):
                self._said += part
            return self.wait()  # all is said
        return None

    def wait(self) -> int:
        """The exit status, once it has ended; 1 if nobody saw it end."""
        return [*self.listen(2), 1, 1][1]

    def kill(self) -> None:
        """End it now."""
        if said := self.listen(1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(said[0], signal.SIGKILL)

    def close(self) -> None:
        """Let go of it: a party on a leash ends."""
        os.close(self._status)
        os.close(self._leash)


def _readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, 1000 * seconds)))


class _Nursery:
    """The other end: started with the first party, ended with this process."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        self.owner, self.socket = os.getpid(), ours
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the nursery lives
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # what ends a terminal's processes must leave who cleans up behind them
            )
        atexit.register(self.end)

    def end(self) -> None:
        if self.owner == os.getpid():
            self.socket.close()
            self.process.kill()  # what this process forked may hold the socket, too
            self.process.wait()
            self.log.close()

    def ask(self, what: dict, descriptors: list[int], deadline: float) -> None:
        """Send one request. It goes through the socket: an environment holds passwords, and no disk should.

        Raises:
            Silent: it could not be sent in time.
        """
        packed = json.dumps(what).encode()
        self.socket.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            socket.send_fds(self.socket, [struct.pack("!I", len(packed))], descriptors)
            self.socket.sendall(packed)
        except TimeoutError as error:
            raise Silent from error
        except ConnectionError:  # it has ended: then nobody answers
            pass


_lock = threading.Lock()
_here: _Nursery | None = None


@contextlib.contextmanager
def _nursery(deadline: float):
    """The nursery, for one request at a time; one that does not answer is ended, and the next request has another."""
    global _here
    if not _lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise Silent
    try:
        if _here is None or _here.owner != os.getpid() or _here.process.poll() is not None:
            _here = _Nursery()
        yield _here
    except Silent:
        if _here is not None:
            _here.end()
        raise
    finally:
        _lock.release()


def guard(folder: Path, deadline: float) -> None:
    """Have a folder removed when this process ends, even by a signal.

    Raises:
        Silent: the nursery does not answer in time.
    """
    with _nursery(deadline) as nursery:
        nursery.ask({"folder": str(folder)}, [], deadline)


def bear(
    words: list[str], folder: Path, threads: int, deadline: float, descriptors: Mapping[str, int] | None = None
) -> Born:
    """Start one party.

    Args:
        words: its command line, of `party`, its role first.
        folder: where ROLE.log, all that it prints, goes.
        threads: of its computations.
        deadline: on `time.monotonic`, until when it must have started.
        descriptors: what it inherits, by the option that tells it the number, such as "--listen=".

    Raises:
        Silent: the nursery does not answer in time.
    """
    given = dict(descriptors or {})
    asked = {"words": words, "options": list(given), "threads": threads, "environment": dict(os.environ)}
    held, leash = os.pipe()
    status, told = os.pipe()
    born = Born(status, leash)
    try:
        with (
            open(held),
            open(told, "w") as telling,
            open(folder / f"{words[0]}.log", "wb") as log,
            _nursery(deadline) as nursery,
        ):
            nursery.ask(asked, [held, told, log.fileno(), *given.values()], deadline)
            telling.close()  # only who watches the party can tell of it now
            if not born.listen(1, deadline):
                nursery.log.seek(0)
                log.write(nursery.log.read() or b"the process that forks the parties ended")
    except BaseException:
        born.close()
        raise
    return born


def _request(requests: socket.socket, parent: int) -> tuple[dict, list[int]] | None:
    """The next request with its descriptors; None if nobody is left who could ask."""
    while not _readable(requests.fileno(), 1.0):
        if os.getppid() != parent:  # what it forked may hold the socket
            return None
    head, descriptors, *_ = socket.recv_fds(requests, 4, 8)
    if len(head) < 4:
        return None
    (size,) = struct.unpack("!I", head)
    whole = b""
    while len(whole) < size:
        part = requests.recv(size - len(whole))
        if not part:
            return None
        whole += part
    return json.loads(whole), list(descriptors)


def _remove(folders: set[str]) -> None:
    """Remove what the process left; its parties end by themselves, and may still be writing for a moment."""
    deadline = time.monotonic() + 5
    while any(map(os.path.exists, folders)) and time.monotonic() < deadline:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def serve(requests: socket.socket) -> None:
    """Fork a party for every request, until nobody is left who could ask."""
    # Who asked decides what becomes of the parties, and this process must outlive it.
    for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(caught, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    parent = os.getppid()

    import numpy as np
    import torch

    from ...compat import without_compiler
    from .. import protocol_of
    from . import party

    protocol_of("tuned")
    with without_compiler():
        torch.empty(1, device="meta") + 1  # torch imports half a second's worth for its first meta tensor

    folders: set[str] = set()
    while True:
        asked = _request(requests, parent)
        if asked is None:
            return _remove(folders)
        request, descriptors = asked
        if "folder" in request:
            folders = {folder for folder in folders if os.path.exists(folder)} | {request["folder"]}
            continue
        if "--protocol=stock" in request["words"]:
            protocol_of("stock")  # seconds, which every fork would spend again
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)

    # A watcher, which tells of the party's end and does nothing else.
    for caught in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(caught, signal.SIG_DFL)
    requests.close()
    leash, told, log, *given = descriptors
    sys.argv[1:] = request["words"] + [f"{option}{number}" for option, number in zip(request["options"], given)]
    number = os.fork()
    if number:
        for descriptor in (leash, log, *given):
            os.close(descriptor)
        os.write(told, b"%d\n" % number)
        _, status = os.waitpid(number, 0)
        os.write(told, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)

    # The party.
    os.close(told)
    for ours, standard in ((leash, 0), (log, 1), (log, 2)):
        os.dup2(ours, standard)
    os.environ.clear()
    os.environ.update(request["environment"])
    torch.set_num_threads(request["threads"])
    # A fork has the nursery's random state. CrypTen's dealer draws keys from torch's: the same in every session, and
    # for any party to draw again.
    torch.seed()
    random.seed()
    np.random.seed()
    try:
        party.main(launched=True)
        end: int | str | None = 0
    except SystemExit as error:
        end = error.code
    if isinstance(end, str):
        print(end, file=sys.stderr)
        end = 1
    sys.stdout.flush()
    # Not by way of the interpreter's end: in a fork that copies all memory, only to free it, which takes a second.
    os._exit(end or 0)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        serve(requests)

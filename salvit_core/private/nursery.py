"""Forks the parties' processes from one that has imported what they need: seconds less for every private inference.

    python -m salvit_core.private.nursery DESCRIPTOR

The nursery holds no weights, no images and no keys; what forks from it is a process of its own. It serves the process
that started it, over the socket with this descriptor, and ends with it.
"""

import atexit
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path


class Born:
    """One process forked by the nursery, as `subprocess.Popen` would show it."""

    def __init__(self, status: int, leash: int):
        self._status, self._leash = status, leash
        self._said = b""
        os.set_blocking(status, False)

    def _listen(self, lines: int) -> list[int]:
        """Wait for what is said of the process: its number, then its exit status; fewer if nobody is left to say it."""
        os.set_blocking(self._status, True)
        while self._said.count(b"\n") < lines and (part := os.read(self._status, 64)):
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
        return [*self._listen(2), 1, 1][1]

    def kill(self) -> None:
        """End it now."""
        if said := self._listen(1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(said[0], signal.SIGKILL)

    def close(self) -> None:
        """Let go of it: a party on a leash ends."""
        os.close(self._status)
        os.close(self._leash)


class _Nursery:
    """The other end: started with the first party, ended with this process."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        self.owner, self.socket = os.getpid(), ours
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the nursery lives
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, pass_fds=[theirs.fileno()]
            )
        atexit.register(self.end)

    def end(self) -> None:
        if self.owner == os.getpid():
            self.socket.close()
            self.process.kill()  # what this process forked may hold the socket, too
            self.process.wait()
            self.log.close()


_lock = threading.Lock()
_here: _Nursery | None = None


def bear(words: list[str], folder: Path, threads: int, listening: Sequence[int] = ()) -> Born:
    """Start one party.

    Args:
        words: its command line, of `party`, its role first.
        folder: where ROLE.json, what is asked for, and ROLE.log, all that it prints, go.
        threads: of its computations.
        listening: the socket that it inherits, for --listen, if any.
    """
    global _here
    asked = folder / f"{words[0]}.json"
    asked.write_text(json.dumps({"words": words, "threads": threads, "environment": dict(os.environ)}))
    held, leash = os.pipe()
    status, told = os.pipe()
    born = Born(status, leash)
    try:
        with _lock, open(held), open(told, "w") as telling, open(folder / f"{words[0]}.log", "wb") as log:
            if _here is None or _here.owner != os.getpid() or _here.process.poll() is not None:
                _here = _Nursery()
            with contextlib.suppress(BrokenPipeError):  # it has ended: then nobody answers
                socket.send_fds(_here.socket, [str(asked).encode()], [held, told, log.fileno(), *listening])
            telling.close()  # only who watches the party can tell of it now
            if not born._listen(1):  # one request at a time
                _here.log.seek(0)
                log.write(_here.log.read() or b"the process that forks the parties ended")
    except BaseException:
        born.close()
        raise
    return born


def serve(requests: socket.socket) -> None:
    """Fork a party for every request, until nobody is left who could ask."""
    import numpy as np
    import torch

    from ..compat import without_compiler
    from . import party

    with without_compiler():
        torch.empty(1, device="meta") + 1  # torch imports half a second's worth for its first meta tensor

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked decides what becomes of the parties
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    while True:
        asked, (leash, told, log, *listening), *_ = socket.recv_fds(requests, 4096, 4)
        if not asked:
            return
        if os.fork() == 0:
            break
        for descriptor in (leash, told, log, *listening):
            os.close(descriptor)

    # A watcher, which tells of the party's end and does nothing else.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests.close()
    request = json.loads(Path(asked.decode()).read_text())
    sys.argv[1:] = request["words"] + [f"--listen={descriptor}" for descriptor in listening]
    number = os.fork()
    if number:
        for descriptor in (leash, log, *listening):
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
        party.main()
        end = 0
    except SystemExit as error:
        end = error.code
    if isinstance(end, str):
        print(end, file=sys.stderr)
        end = 1
    sys.stdout.flush()
    # Not by way of the interpreter's end: in a fork that copies all memory, only to free it, which takes a second.
    os._exit(end)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        serve(requests)

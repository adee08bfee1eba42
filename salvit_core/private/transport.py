"""One connection of two parties: tensors both ways at once, small agreed messages, and a count of what it took.

A channel keeps nobody out and hides nothing: it is as trustworthy as the socket that it is given. `parties.rendezvous`
gives it TLS 1.3 between known certificates; `parties.launch` a pair of sockets that nobody else was ever connected to.

Tensors travel as their bytes alone: both ends know every shape from the public tape, so that what a peer sends can
never ask for memory. Other messages say their length, which is bounded.
"""

import json
import select
import socket
import ssl
import struct
import time
from typing import Any

import torch

TERMS = 1 << 16  # bytes that a small control message may have


class TransportError(Exception):
    """The connection is lost, the peer is silent, or what it says is no message; in one line that names the peer."""


class Channel:
    """A connected stream socket, plain or TLS.

    Attributes:
        rounds: messages one way, or both ways at once, since `reset`.
        sent: bytes of tensors that this end sent since `reset`.
        received: bytes of tensors that this end received since `reset`.

    Args:
        connection: the socket; the channel owns it.
        peer: role of the party at the other end, for errors.
        deadline: on `time.monotonic`, when whoever still waits gives up.
    """

    def __init__(self, connection: socket.socket, peer: str, deadline: float):
        self.peer, self.deadline = peer, deadline
        self._socket = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reset()

    def reset(self) -> None:
        """Count anew."""
        self.rounds, self.sent, self.received = 0, 0, 0

    def send(self, tensor: torch.Tensor) -> None:
        """Send a contiguous tensor; the other receives one as large."""
        self.exchange(tensor, None)

    def receive(self, into: torch.Tensor) -> torch.Tensor:
        """Fill a contiguous tensor with what the other sends."""
        self.exchange(None, into)
        return into

    def exchange(self, ours: torch.Tensor | None, into: torch.Tensor | None) -> torch.Tensor | None:
        """Send a contiguous tensor and fill another, both at once; or one of the two."""
        out, theirs = (None if each is None else _bytes(each) for each in (ours, into))
        self._move(out, theirs)
        self.rounds += 1
        self.sent += 0 if out is None else out.nbytes
        self.received += 0 if theirs is None else theirs.nbytes
        return into

    def barrier(self) -> None:
        """Wait until the other is here, too. Not counted."""
        self._move(memoryview(b"."), memoryview(bytearray(1)))

    def say(self, what: Any) -> None:
        """Send what JSON can hold; the other hears. Not counted."""
        packed = json.dumps(what).encode()
        self._move(out=memoryview(struct.pack("!I", len(packed)) + packed))

    def hear(self, most: int = TERMS) -> Any:
        """What the other says, of at most this many bytes. Not counted.

        Raises:
            TransportError: it is longer, or not JSON.
        """
        head = bytearray(4)
        self._move(into=memoryview(head))
        (size,) = struct.unpack("!I", head)
        if size > most:
            raise TransportError(f"the {self.peer} sent a message of {size} bytes where {most} are the most")
        body = bytearray(size)
        self._move(into=memoryview(body))
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise TransportError(f"the {self.peer} sent what is not JSON") from error

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _move(self, out: memoryview | None = None, into: memoryview | None = None) -> None:
        """Send all of one buffer and fill the other, whichever can go on: waiting for one alone could lock both up."""
        out, into = out or memoryview(b""), into or memoryview(b"")
        while out.nbytes or into.nbytes:
            # What each way waits for: TLS may have to read before it can write.
            waiting = 0
            try:
                while out.nbytes:
                    out = out[self._socket.send(out) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                waiting |= select.POLLOUT
            except ssl.SSLWantReadError:
                waiting |= select.POLLIN
            except OSError as error:
                raise self._lost(error) from error
            # Turn about: a peer that reads nothing before it has sent all would else be waited for.
            try:
                while into.nbytes:
                    count = self._socket.recv_into(into)
                    if not count:
                        raise self._lost("it closed")
                    into = into[count:]
            except (BlockingIOError, ssl.SSLWantReadError):
                waiting |= select.POLLIN
            except ssl.SSLWantWriteError:
                waiting |= select.POLLOUT
            except OSError as error:
                raise self._lost(error) from error
            if waiting and (out.nbytes or into.nbytes):
                self._wait(waiting)

    def _wait(self, events: int) -> None:
        left = self.deadline - time.monotonic()
        self._poll.modify(self._socket, events)
        if left <= 0 or not self._poll.poll(1000 * left):
            raise TransportError(f"the {self.peer} did not answer in time")

    def _lost(self, why: OSError | str) -> TransportError:
        why = why if isinstance(why, str) else why.strerror or type(why).__name__
        return TransportError(f"lost the connection to the other party, the {self.peer} ({why})")


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory; without elements an empty one, which memoryview cannot cast."""
    return memoryview(tensor.detach().numpy()).cast("B") if tensor.numel() else memoryview(b"")

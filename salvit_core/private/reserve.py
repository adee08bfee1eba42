"""Correlations that were dealt ahead of time, in a folder of one party's: each serves one query, once.

A session with a dealer fills the folders of the server and the client, for one network, its weights and one shape of
images. Later sessions draw from them, and need no dealer.

    reserve.json   what it was dealt for; written last, so that a folder without it holds nothing
    weights        the key of the weights' masks; with the client, the masked weights, too
    0.key ...      each query's key; with the server, each query's corrections
    drawn          a line for each query that was drawn

A query counts as drawn from the moment when its line is on the disk, which is before its key is read: whatever is
killed when, no party uses it twice. What one party drew and the other did not is skipped. The key is erased once it is
read: who takes the folder later learns nothing of past queries.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAME = "reserve.json"


class ReserveError(Exception):
    """Why a folder cannot serve, in one line."""


def mark_of(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of weights: masks that hid others must not hide these."""
    mark = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        mark.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        mark.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()


class Reserve:
    """One party's folder; `new` makes one to be filled, `opened` takes one that is full, for this process alone."""

    def __init__(self, path: Path):
        self.path = path
        self.terms: dict[str, Any] = {}
        self._last = -1  # the last query that was drawn
        self._log = -1  # of the file `drawn`, once it is open

    # To fill it

    @classmethod
    def new(cls, path: Path) -> "Reserve":
        """An empty folder, for this user alone.

        Raises:
            ReserveError: it is there already, or cannot be made.
        """
        try:
            path.mkdir(mode=0o700, parents=True)
        except FileExistsError as error:
            raise ReserveError(
                f"{path} is there already: a reserve is never overwritten, name another folder"
            ) from error
        except OSError as error:
            raise ReserveError(f"cannot make {path} ({error.strerror}): name another folder") from error
        return cls(path)

    def put(self, query: int, key: bytes, corrections: Iterable[torch.Tensor]) -> None:
        """Keep what a query needs: a key, and at the server its corrections, node by node."""
        if parts := self._written(f"{query}.corrections", corrections):
            self.terms["words"] = parts
        self._written(f"{query}.key", [torch.from_numpy(np.frombuffer(key, np.int64).copy())])

    def seal(self, key: bytes, masked: dict[str, torch.Tensor], terms: dict[str, Any]) -> None:
        """Keep the weights' part and say what all of it is for: from now on it can be opened.

        Args:
            key: of the weights' masks.
            masked: at the client, the masked weights by name.
            terms: what a session must have alike, and the number of queries.
        """
        with self._file("weights") as file:
            torch.save({"key": key, "masked": masked}, file)
            _synced(file)
        self.terms |= terms
        with self._file("drawn") as file:
            _synced(file)
        with self._file(f"{NAME}.new") as file:
            file.write(json.dumps(self.terms).encode())
            _synced(file)
        os.replace(self.path / f"{NAME}.new", self.path / NAME)
        self._sync()

    def _written(self, name: str, tensors: Iterable[torch.Tensor]) -> int:
        """Words written into a new file; none is made for none."""
        words = 0
        with contextlib.ExitStack() as stack:
            file = None
            for tensor in tensors:
                file = file or stack.enter_context(self._file(name))
                file.write(memoryview(tensor.numpy()).cast("B"))  # type: ignore[arg-type]  # an array is a buffer
                words += tensor.numel()
            if file is not None:
                _synced(file)
        return words

    def _file(self, name: str):
        return open(os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    # To draw from it

    @classmethod
    def opened(cls, path: Path) -> "Reserve":
        """A full one; no other process can open it before this one ends.

        Raises:
            ReserveError: it is none, was not filled to its end, or another process draws from it.
        """
        reserve = cls(path)
        try:
            reserve._log = os.open(path / "drawn", os.O_RDWR | os.O_APPEND)
            fcntl.flock(reserve._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            reserve.terms = json.loads((path / NAME).read_text())
            lines = (path / "drawn").read_bytes()
            whole = lines.rpartition(b"\n")[0]
            os.ftruncate(reserve._log, len(whole) and len(whole) + 1)  # of a line that was cut off the key was not read
            reserve._last = max([-1, *map(int, whole.split())])
            # Whoever drew last may have been killed before it erased what it drew.
            reserve._erase(int(file.stem) for file in path.glob("*.key") if int(file.stem) <= reserve._last)
        except BlockingIOError as error:
            raise ReserveError(f"{path} is in use by another process: one at a time draws from a reserve") from error
        except FileNotFoundError as error:
            raise ReserveError(f"{path} is no reserve that was filled to its end: fill another with --fill") from error
        except OSError as error:
            raise ReserveError(f"cannot read {path} ({error.strerror})") from error
        except ValueError as error:
            raise ReserveError(f"{path} is damaged ({error}): fill another with --fill") from error
        return reserve

    def check(self, terms: dict[str, Any]) -> None:
        """Insist that it was dealt for what is now asked for.

        Raises:
            ReserveError: names the first difference.
        """
        for name, wanted in terms.items():
            if (had := self.terms.get(name)) != wanted:
                raise ReserveError(f"{self.path} was dealt for {name} {had}, this run has {wanted}: fill another")

    def weights(self) -> tuple[bytes, dict[str, torch.Tensor]]:
        """The key of the weights' masks, and with the client the masked weights."""
        found = torch.load(self.path / "weights", weights_only=True)
        return found["key"], found["masked"]

    def insist(self, queries: int) -> None:
        """Insist that so many are left.

        Raises:
            ReserveError: there are fewer.
        """
        if (left := self.terms["queries"] - self.next) < queries:
            raise ReserveError(f"{self.path} has {left} queries left and {queries} are wanted: fill another")

    @property
    def next(self) -> int:
        """The lowest query that was never drawn here."""
        return self._last + 1

    def draw(self, query: int) -> tuple[bytes, torch.Tensor | None]:
        """A query's key, and with the server its corrections; nothing of it, and of those before it, stays.

        Raises:
            ReserveError: it was drawn before, or there is none left.
        """
        if query < self.next:
            raise ReserveError(f"{self.path}: query {query} was drawn before")
        if query >= self.terms["queries"]:
            raise ReserveError(f"{self.path} is used up: all {self.terms['queries']} queries were drawn, fill another")
        os.write(self._log, b"%d\n" % query)
        os.fsync(self._log)
        first, self._last = self.next, query
        corrections, (key, data) = None, (self.path / f"{query}.{part}" for part in ("key", "corrections"))
        mine = key.read_bytes()
        if data.exists():
            corrections = torch.from_numpy(np.fromfile(data, np.int64))
        self._erase(range(first, query + 1))
        if len(mine) != 16 or (0 if corrections is None else len(corrections)) != self.terms.get("words", 0):
            raise ReserveError(f"{self.path}: the files of query {query} are cut off: fill another")
        return mine, corrections

    def _erase(self, queries: Iterable[int]) -> None:
        for query in queries:
            for part in ("corrections", "key"):
                (self.path / f"{query}.{part}").unlink(missing_ok=True)
        self._sync()

    def _sync(self) -> None:
        """What was made or removed in the folder is on the disk."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _synced(file) -> None:
    file.flush()
    os.fsync(file.fileno())

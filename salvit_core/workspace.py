"""Where data/ and figures/ lie, how a file is written: whole or not at all; and how one is read.

One writer for all that a user keeps, one reader for all that may have been damaged meanwhile.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def _root() -> Path:
    """SALVIT_ROOT; else the checkout that this file lies in; of an installed package, the folder one is in."""
    if named := os.environ.get("SALVIT_ROOT"):
        root = Path(named).resolve()
        os.environ["SALVIT_ROOT"] = str(root)  # a notebook's kernel begins in another folder
        return root
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


ROOT = _root()


def write(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, never half of one.

    What stands there and is no plain file stays: a link, which would be replaced and not followed, a FIFO, a device.

    Args:
        path: the file; other processes may write the same one meanwhile.
        content: its text or bytes, or what writes it into an open file, such as torch.save does.

    Raises:
        OSError: no room, no right to write, or no plain file; names the file.
    """
    _refuse_special(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            if isinstance(content, str | bytes):
                file.write(content.encode() if isinstance(content, str) else content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save answers a full disk with a RuntimeError of its own; what the disk said is behind it.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        reason = f"cannot write {path} ({cause.strerror or cause}): make room, or write elsewhere"
        raise type(cause)(cause.errno, reason) from error
    finally:
        _forget(partial)


def refuse_another(path: Path, said: dict) -> None:
    """Refuse a result that stands at a path and is of something else, which would be overwritten.

    Args:
        path: of a result in JSON, which may not be there.
        said: the fields that tell results apart, plain data.

    Raises:
        ValueError: it differs in one of them; names the fields.
    """
    if not path.is_file():
        return
    try:
        there = json.loads(path.read_text())
        other = [name for name, value in json.loads(json.dumps(said)).items() if there.get(name) != value]
    except (ValueError, AttributeError):
        other = ["content"]
    if other:
        raise ValueError(f"{path} is another result, by its {' and '.join(other)}: give another --out, or delete it")


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Write plain data as JSON, which holds no NaN and no infinity.

    Args:
        path: as in `write`.
        content: plain data.
        options: of `json.dumps`.

    Raises:
        ValueError: a number that is not finite; names the field and the file.
        OSError: as `write`.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False, **options)
    except ValueError as error:
        field, value = next(_not_finite(content), ("a field", error))
        raise ValueError(f"{field} is {value}, which {path} cannot hold: find where it comes from") from None
    write(path, text)


def try_out(path: Path) -> None:
    """Refuse a file that could not be written, before hours are spent on what it is to hold; it is not touched.

    Raises:
        OSError: as `write`.
    """
    _refuse_special(path)
    trial = path.with_name(f".{path.name}.{os.getpid()}.trial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"")
    except OSError as error:
        reason = f"cannot write {path} ({error.strerror or error}): make room, or write elsewhere"
        raise type(error)(error.errno, reason) from error
    finally:
        _forget(trial)


def readable(path: Path) -> Path:
    """The path of a plain file that may be read, to be opened at once.

    Raises:
        OSError: it is not there, may not be read, or is no plain file, which might never end; names the file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        with open(path, "rb"):
            return path
    except OSError as error:
        reason = f"cannot read {path} ({error.strerror or error}): mend that, or name another file"
        raise type(error)(error.errno, reason) from error


_SPECIAL = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"))


def _refuse_special(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # what is wrong with the place, writing says
    if not stat.S_ISREG(mode):
        what = next((name for holds, name in _SPECIAL if holds(mode)), "a device or a socket")
        raise OSError(errno.EINVAL, f"cannot write {path}: it is {what}, no plain file; name another file")


def _forget(partial: Path) -> None:
    try:
        partial.unlink(missing_ok=True)
    except OSError:  # the folder is not there, or is none: so neither is the file
        return


def _not_finite(content: Any, name: str = ""):
    """Where plain data holds a number that is not finite, and which."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _not_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple):
        for i, value in enumerate(content):
            yield from _not_finite(value, f"{name}[{i}]")
    elif isinstance(content, float) and not math.isfinite(content):
        yield name or "the content", content

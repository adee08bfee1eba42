import collections
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from salvit_core import compat
from salvit_core import datasets as data
from salvit_core.datasets import augment, source

compat.repair()
load = sys.modules[data.load.__module__]  # the module; the package's `load` is its function
from torchvision.transforms import v2  # noqa: E402

NO_MEAN, NO_STD = (0.0,), (1 / 255,)  # pixels come back from `batches` as they are


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, channels=3, side=32, seed=0):
    # smooth shapes with some noise: a photograph's histogram rather than a constant or white noise
    coarse = torch.rand(count, channels, 5, 5, generator=generator(seed))
    fine = torch.rand(count, channels, side, side, generator=generator(seed + 1))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return (255 * (0.85 * smooth + 0.15 * fine)).clamp(0, 255).byte()


def numbered(count, side=8):
    # image i holds the number i in every pixel, and its label is i
    images = torch.arange(count).byte().view(-1, 1, 1, 1).repeat(1, 1, side, side)
    return data.Split(images, torch.arange(count), NO_MEAN, NO_STD)


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def rows(split):
    return collections.Counter(image.numpy().tobytes() for image in split.images)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# load and its splits


def test_digits():
    digits = data.load("digits")
    assert (digits.name, digits.classes, digits.chosen) == ("digits", 10, "")
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part.labels) for part in parts] == [1294, 144, 359]
    for part in parts:
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (1, 8, 8)
        assert part.labels.dtype == torch.int64 and part.images.max() == 255
    from sklearn.datasets import load_digits

    expected = collections.Counter(np.rint(x * 255 / 16).astype(np.uint8).tobytes() for x in load_digits().images)
    assert sum((rows(part) for part in parts), collections.Counter()) == expected  # every image in exactly one part


def test_mean_and_std_are_those_of_the_images_meant_for_training():
    digits = data.load("digits")
    pixels = torch.cat([digits.train.images, digits.validation.images]).double() / 255
    assert digits.train.mean == (round(pixels.mean().item(), 4),)
    assert digits.train.std == (round(pixels.std(correction=0).item(), 4),)


def test_the_seed_fixes_the_split():
    one, same, other = (data.load("digits", seed=seed) for seed in (1, 1, 2))
    for part in ("train", "validation", "test"):
        assert equal(getattr(one, part), getattr(same, part))
        assert rows(getattr(one, part)) != rows(getattr(other, part))


def test_released_protocol_validates_on_the_test_set():
    held, released = data.load("digits"), data.load("digits", protocol="released")
    assert released.validation is released.test and equal(released.test, held.test)
    assert rows(released.train) == rows(held.train) + rows(held.validation)
    assert (released.test.mean, released.test.std) == (held.train.mean, held.train.std)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "mnist"}, "'mnist' is unknown: choose from auto, digits"),
        ({"protocol": "test"}, "'test' is unknown: choose from held-out, released"),
        ({"validation": 0}, "validation is 0"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"validation": 0.0001}, "holds out 0"),
        ({"image": 0}, "image is 0"),
    ],
)
def test_load_refuses(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        data.load(**{"name": "digits", **wrong})
    one_line(error)


def test_resized_once_at_load():
    digits, larger = data.load("digits"), data.load("digits", image=20)
    assert larger.train.images.shape == (1294, 1, 20, 20) and larger.train.images.dtype == torch.uint8
    expected = v2.functional.resize(digits.test.images, [20, 20], antialias=True)
    assert (larger.test.images.int() - expected.int()).abs().max() <= 1


def test_resizing_beyond_memory_is_refused(monkeypatch):
    monkeypatch.setattr(source.os, "sysconf", {"SC_AVPHYS_PAGES": 250, "SC_PAGE_SIZE": 4000}.get)
    with pytest.raises(ValueError, match=r"1294 images at 64 pixels needs 0\.0053 GB of memory, 0\.001 GB are free"):
        data.load("digits", image=64)


# batches


def test_without_a_generator_the_order_stays():
    split = numbered(10)
    found = list(data.batches(split, 4))
    assert [len(labels) for _, labels in found] == [4, 4, 2]
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(10))
    assert found[0][0].dtype == torch.float32 and found[0][1].dtype == torch.int64


@pytest.mark.parametrize("chunk", [1, 500, 2**23])
def test_with_a_generator_it_is_shuffled_and_labels_follow(monkeypatch, chunk):
    monkeypatch.setattr(load, "_CHUNK", chunk)
    found = list(data.batches(numbered(100), 16, generator=generator()))
    labels = torch.cat([labels for _, labels in found])
    images = torch.cat([images for images, _ in found])
    assert labels.tolist() != list(range(100)) and sorted(labels.tolist()) == list(range(100))
    assert torch.equal(images[:, 0, 3, 3].round().long(), labels)


def test_drop_last():
    for count, expected in ((10, [4, 4]), (8, [4, 4]), (3, [])):
        found = list(data.batches(numbered(count), 4, generator=generator(), drop_last=True))
        assert [len(labels) for _, labels in found] == expected
        assert all(len(images) == 4 for images, _ in found)


@pytest.mark.parametrize("augment", data.AUGMENT)
def test_same_state_same_batches_and_the_next_pass_differs(augment):
    split = data.Split(pictures(50), torch.arange(50), (0.5,) * 3, (0.2,) * 3)

    def two_passes(seed):
        own = generator(seed)
        passes = [list(data.batches(split, 16, augment, own)) for _ in range(2)]
        return [[torch.cat(part) for part in zip(*found, strict=True)] for found in passes]

    one, again, other = two_passes(3), two_passes(3), two_passes(4)
    for a, b in zip(one, again, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(one[0][0], one[1][0]) and not torch.equal(one[0][0], other[0][0])
    assert one[0][0].shape == (50, 3, 32, 32) and one[0][0].dtype == torch.float32


def test_leaving_a_pass_early_changes_nothing_after_it(monkeypatch):
    monkeypatch.setattr(load, "_CHUNK", 1)
    whole, early = generator(), generator()
    list(data.batches(numbered(20), 4, "crop", whole))
    next(data.batches(numbered(20), 4, "crop", early))
    assert torch.equal(whole.get_state(), early.get_state())


def test_normalisation():
    mean, std = (0.1, 0.4, 0.7), (0.5, 0.25, 0.3)
    split = data.Split(pictures(8), torch.arange(8), mean, std)
    ((images, _),) = data.batches(split, 8)
    expected = (split.images.double().numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"augment": "mixup"}, "'mixup' is unknown: choose from none, crop, autoaugment"),
        ({"augment": "crop"}, "give a generator"),
        ({"size": 0}, "size is 0"),
    ],
)
def test_batches_refuses_at_once(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        data.batches(**{"split": numbered(4), "size": 2, **wrong})
    one_line(error)


def test_a_split_refuses_statistics_of_other_channels():
    with pytest.raises(ValueError, match="mean has 3 and std 1 values, the images 1 channels") as error:
        data.Split(numbered(4).images, torch.arange(4), (0.5, 0.5, 0.5), NO_STD)
    one_line(error)


@pytest.mark.parametrize("kind", data.AUGMENT)
def test_processes_share_a_batch_and_augment_only_their_own_part(monkeypatch, kind):
    """Together they have what one alone has, image by image; and none touches the others' pixels."""
    split = data.Split(pictures(53), torch.arange(53), NO_MEAN * 3, NO_STD * 3)
    touched = []
    for name in ("crop", "autoaugment"):
        whole = getattr(augment, name)
        monkeypatch.setattr(load, name, lambda x, *more, do=whole: touched.append(len(x)) or do(x, *more))
    alone = list(data.batches(split, 10, kind, generator()))
    steps = len(touched)
    parts = [list(data.batches(split, 10, kind, generator(), part=(rank, 3))) for rank in range(3)]
    for i, (images, labels) in enumerate(alone):
        for rank, part in enumerate(parts):
            assert torch.equal(part[i][0], images[rank::3]) and torch.equal(part[i][1], labels[rank::3])
    # Batches of 10 go 4, 3, 3; the last one, of 3, one each.
    assert touched == [53] * steps + [21] * steps + [16] * steps + [16] * steps


@pytest.mark.processes
def test_torchvision_is_imported_only_for_what_needs_it():
    code = (
        "import sys, torch; from salvit_core import datasets as data; d = data.load('digits')\n"
        "list(data.batches(d.train, 256, 'crop', torch.Generator()))\n"
        "assert not {'torchvision', 'PIL'} & set(sys.modules), 'imported too early'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(data.__file__).parents[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_draws_on_a_gpu():
    here, there = data.load("digits"), data.load("digits", device="cuda")
    assert there.train.images.is_cuda and (there.train.mean, there.train.std) == (here.train.mean, here.train.std)
    for kind in data.AUGMENT:
        found = [torch.cat([x for x, _ in data.batches(d.train, 256, kind, generator())]).cpu() for d in (here, there)]
        if kind == "autoaugment":
            assert ((found[0] - found[1]).abs() < 1.5).float().mean() > 0.98
        else:
            torch.testing.assert_close(*found)

"""What a change that only moves code keeps: the losses of seeded trainings of every kind."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from salvit_core import build, datasets, preset
from salvit_core.training import Recipe, train

UNCHANGED = json.loads(Path(__file__).with_name("unchanged.json").read_text())
RECIPE = Recipe(epochs=2, batch=64, lr=2e-3, augment="crop")
HEADS = dict(attention=(("self", "external"), ("external", "self")), normalizer="l2q")
CASES = {
    "SA softmax": (preset("cct_2_3x1", "SA softmax"), {}),
    "SA L2Q": (preset("cct_2_3x1", "SA L2Q"), {}),
    "EA L2Q": (preset("cct_2_3x1", "EA L2Q"), {}),
    "global L2Q, decay_all, adam, clip": (
        preset("cct_2_3x1", "SA L2Q", l2q_granularity="global"),
        dict(decay_all=True, optimizer="adam", clip=0.5, keep="last"),
    ),
    "heads": (preset("cct_2_3x1", **HEADS), {}),
    "Performer, autoaugment": (preset("cct_2_3x1", attention="performer"), dict(augment="autoaugment")),
    "ViT, Linformer": (preset("vit_2", attention="linformer"), dict(augment="none")),
    "channels_last": (
        preset("cct_2_3x1", "EA softmax", activation="learned_quad"),
        dict(channels_last=True, seed=3),
    ),
    "distil logits": (preset("cct_2_3x1", "SA L2Q"), dict(distill_logits=1.0)),
    "distil features": (preset("cct_2_3x1", "SA L2Q"), dict(distill_features=1.0)),
}


@pytest.fixture(scope="module")
def data():
    """256 of the digits to train on, 64 to validate and to test."""

    def cut(split, count):
        return dataclasses.replace(split, images=split.images[:count], labels=split.labels[:count])

    found = datasets.load("digits")
    parts = {"train": cut(found.train, 256), "validation": cut(found.validation, 64), "test": cut(found.test, 64)}
    return dataclasses.replace(found, **parts)


@pytest.fixture(scope="module")
def teacher(data):
    model = seeded(preset("cct_2_3x1", "SA softmax"))
    train(model, data, RECIPE)
    return model


def seeded(config):
    torch.manual_seed(0)
    return build(config)


def test_the_fixture_is_of_these_cases():
    assert set(UNCHANGED) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_losses(name, data, request):
    """To what other processors' sums do to eight steps; on the fixture's machine they are equal to the last bit."""
    config, changes = CASES[name]
    taught = request.getfixturevalue("teacher") if name.startswith("distil") else None
    found = train(seeded(config), data, dataclasses.replace(RECIPE, **changes), taught)
    expected = UNCHANGED[name]
    for epoch, facts in zip(expected["epochs"], found["history"], strict=True):
        for part, value in epoch.items():
            # A divergence of logits that are nearly equal is a small difference of large numbers, in float32.
            rounding = 1e-7 if part == "distill_logits" else 0.0
            tolerance = dict(abs=2.0) if part.endswith("accuracy") else dict(rel=2e-4, abs=rounding)
            assert facts[part] == pytest.approx(value, **tolerance), part
    assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=2e-4)

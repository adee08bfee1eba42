"""What a change that only moves code keeps: what seeded searches of every kind choose, and their losses."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from salvit_core import datasets, preset
from salvit_core.search import priced, released, sas
from salvit_core.training import Recipe

UNCHANGED = json.loads(Path(__file__).with_name("searches.json").read_text())
RECIPE = Recipe(epochs=2, batch=64, lr=2e-3, augment="crop")
CONFIG = preset("cct_2_3x1", "SA L2Q", layers=3)
CASES = {
    "SAS-L": (sas, sas.Search, dict(budget=1)),
    "SAS-L bottom": (sas, sas.Search, dict(budget=2, rule="bottom")),
    "SAS-L random": (sas, sas.Search, dict(budget=1, rule="random")),
    "SAS-H": (sas, sas.Search, dict(budget=2, granularity="head", seed=1)),
    "released": (released, released.ReleasedSearch, dict(budget=1)),
    "no penalty": (sas, sas.Search, dict(budget=1, weight=0.0)),
    "priced": (
        priced,
        priced.PricedSearch,
        dict(budget=6.0, choices=("self", "external", "scaling"), prices=(3.0, 2.0, 1.0)),
    ),
}


@pytest.fixture(scope="module")
def data():
    def cut(split, size):
        return dataclasses.replace(split, images=split.images[:size], labels=split.labels[:size])

    found = datasets.load("digits")
    parts = {"train": cut(found.train, 256), "validation": cut(found.validation, 64), "test": cut(found.test, 64)}
    return dataclasses.replace(found, **parts)


def numbers(value):
    return value if isinstance(value, float) else [numbers(each) for each in value]


@pytest.mark.parametrize("name", CASES)
def test_searches(name, data):
    module, kind, options = CASES[name]
    found, expected = module.search(kind(CONFIG, RECIPE, RECIPE, **options), data), UNCHANGED[name]
    assert json.loads(json.dumps(found["architecture"])) == expected["architecture"]
    torch.testing.assert_close(torch.tensor(found["alphas"]), torch.tensor(expected["alphas"]), rtol=1e-3, atol=1e-6)
    for part, history in (("nas", found["nas"]), ("finetune", found["finetune"]["history"])):
        for epoch, facts in zip(expected[part], history, strict=True):
            for quantity in ("lr", "loss", "cross_entropy", "penalty", "validation_loss"):
                if quantity in epoch:
                    assert facts[quantity] == pytest.approx(epoch[quantity], rel=1e-3), quantity
    with torch.no_grad():
        logits = found["network"].eval()(torch.linspace(-1, 1, 64).view(1, 1, 8, 8)).flatten()
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-2, atol=1e-4)

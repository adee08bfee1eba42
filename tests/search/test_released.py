"""The search as the published code does it: no gradient of the L1 term, decay of all, both branches to the end."""

import dataclasses

import pytest
import torch
from test_sas import GRANULARITIES, RECIPE

from salvit_core import datasets as data
from salvit_core import preset
from salvit_core.search import sas
from salvit_core.search.released import ReleasedSearch, search


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_released_search(few_digits, granularity, monkeypatch):
    models = []
    train = sas.train

    def spy(model, *arguments, **options):
        models.append(model)
        return train(model, *arguments, **options)

    monkeypatch.setattr(sas, "train", spy)
    recipes = dataclasses.replace(RECIPE, epochs=3), RECIPE
    config = preset("cct_2_3x1", normalizer="l2q")
    runs = [ReleasedSearch(config, *recipes, budget=1, granularity=granularity, weight=w) for w in (0.1, 100.0)]
    small, large = (search(run, few_digits) for run in runs)
    assert small["trajectory"] == large["trajectory"]
    assert small["finetune"]["recipe"]["decay_all"]
    (net, _), network = models, small["network"]
    assert isinstance(net, sas.MixedCCT)  # both branches ran to the end
    assert sorted(net.alphas().flatten().unique().tolist()) == [0.0, 1.0]
    images, _ = next(data.batches(few_digits.test, 50))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), net.eval()(images), rtol=1e-5, atol=1e-5)

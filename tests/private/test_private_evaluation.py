"""Encrypted accuracy: refused, stopped and resumed, recorded; drift and precision on networks trained for a moment."""

import pytest
import torch
from torch import nn

from salvit_core import CCT, datasets, preset, private, workspace
from salvit_core.experiments import execute, store
from salvit_core.experiments.execute import collect, ensure
from salvit_core.experiments.runs import DriftRun, EvaluationRun, PrivateRun, TrainRun
from salvit_core.private import evaluation
from salvit_core.private.evaluation import evaluate
from salvit_core.training import Recipe

pytestmark = pytest.mark.processes

TRAINED = TrainRun(
    "digits", preset("cct_2_3x1", "SA L2Q"), Recipe(epochs=3, batch=64, lr=2e-3, augment="none"), images=512
)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    execute.dataset.cache_clear()
    yield tmp_path
    execute.dataset.cache_clear()


def model():
    torch.manual_seed(0)
    return CCT(preset("cct_2_3x1", "SA L2Q", layers=1))


def refused(*args, **kwargs):
    pytest.fail("the parties were started")


@pytest.mark.parametrize("n", [0, -3, 100_000])
def test_a_number_of_images_that_there_is_not_is_refused(monkeypatch, n):
    monkeypatch.setattr(evaluation, "infer", refused)
    data = execute.dataset("digits")
    with pytest.raises(ValueError, match=rf"n is {n}: the test split of digits has {len(data.test.labels)} images"):
        evaluate(model(), data, n=n)


@pytest.fixture
def asked(monkeypatch):
    """How many images each start of the parties was given."""
    counts, infer = [], private.infer

    def counting(model, images, *args, **kwargs):
        counts.append(len(images))
        return infer(model, images, *args, **kwargs)

    monkeypatch.setattr(evaluation, "infer", counting)
    return counts


def check(found, n):
    """What holds for every evaluation of a `tuned` network: the images in their order, right answers."""
    assert found["images"] == n == len(found["history"])
    ours, exact = (torch.tensor([image[name] for image in found["history"]]) for name in ("private", "clear"))
    assert (ours - exact).abs().max().item() == pytest.approx(found["largest_error"], abs=1e-6)
    assert found["mean_error"] <= found["largest_error"] < 0.05
    assert found["agreement"] == 100 * (ours.argmax(1) == exact.argmax(1)).double().mean().item()
    labels = torch.tensor([image["label"] for image in found["history"]])
    assert found["private_accuracy"] == pytest.approx(100 * (ours.argmax(1) == labels).double().mean().item())
    assert found["rounds"] > 20 and found["bytes"] > 0


def test_stopped_and_resumed(root, asked, monkeypatch):
    data, folder, save = execute.dataset("digits"), root / "unfinished", evaluation._save

    def stopped(what, path):
        save(what, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "_save", stopped)
        evaluate(model(), data, n=9, batch=1, folder=folder)
    (kept,) = folder.glob("queries_*.pt")
    left = torch.load(kept, weights_only=True)
    done = len(left["logits"])
    assert 1 <= done < 9 and {row["query"] for row in left["operations"]} == set(range(done))

    resumed = evaluate(model(), data, n=9, batch=1, folder=folder)
    assert asked == [9, 9 - done]
    check(resumed, 9)
    assert {row["query"] for row in torch.load(kept)["operations"]} == set(range(9))

    again = evaluate(model(), data, n=9, batch=1, folder=folder)  # nothing is left to do
    assert asked == [9, 9 - done] and again == resumed

    whole = evaluate(model(), data, n=9, batch=4)  # in one go, the last query not full
    check(whole, 9)
    for name in ("clear_accuracy", "private_accuracy", "agreement", "violations", "images"):
        assert whole[name] == resumed[name], name
    for one, other in zip(whole["history"], resumed["history"], strict=True):
        assert one["label"] == other["label"]
        assert one["private"] == pytest.approx(other["private"], abs=0.02)


def test_a_folder_is_of_one_evaluation(root, asked):
    data, folder = execute.dataset("digits"), root / "unfinished"
    whole = evaluate(model(), data, n=3, batch=1, folder=folder)
    fewer = evaluate(model(), data, n=2, batch=1, folder=folder)  # the same images, without the last
    assert asked == [3] and fewer["history"] == whole["history"][:2]
    # Other weights, another normaliser with the same weights, other data by the same name: each starts anew.
    other, quad = model(), CCT(preset("cct_2_3x1", "SA 2Quad", layers=1))
    torch.nn.init.normal_(other.head.bias)
    softmax = CCT(preset("cct_2_3x1", "SA softmax", layers=1))
    softmax.load_state_dict(quad.state_dict())
    seeded = datasets.load("digits", seed=1)
    for network, images, changes in ((other, data, {}), (quad, data, {}), (softmax, data, {}), (model(), seeded, {})):
        found = evaluate(network, images, n=3, batch=1, folder=folder, **changes)
        check(found, 3)
    assert asked == [3] * 5 and len(list(folder.glob("queries_*.pt"))) == 5
    next(folder.glob("queries_*.pt")).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"queries_\w+.pt holds no finished queries .*: delete it"):
        for network, images in ((other, data), (quad, data), (softmax, data), (model(), seeded), (model(), data)):
            evaluate(network, images, n=3, batch=1, folder=folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n=1.5), "n is 1.5: the test split of digits has"),
        (dict(batch=0), "batch is 0: give 1 or more"),
        (dict(batch=None), "batch is None: give a whole number of images"),
        (dict(batch="8"), "batch is '8': give a whole number"),
        (dict(bits=99), "bits is 99: give 8 to 22"),
        (dict(protocol="magic"), "protocol 'magic' is unknown: choose from stock, tuned"),
    ],
)
def test_what_cannot_be_asked_is_refused(monkeypatch, changes, message):
    monkeypatch.setattr(evaluation, "infer", refused)
    with pytest.raises(ValueError, match=message):
        evaluate(model(), execute.dataset("digits"), **{"n": 4, **changes})


def test_an_evaluation_is_a_record(root, asked):
    run = EvaluationRun(TRAINED, n=6, batch=3)
    assert collect([run], "reference") == {}
    with pytest.raises(FileNotFoundError, match="no reference record .*encrypted/"):
        ensure(run, "reference")
    record = ensure(run)
    assert ensure(run) == record == collect([run, run])[run]
    assert asked == [6]  # once
    check({**record["metrics"], "history": record["history"]}, 6)
    assert record["study"] == "encrypted" and record["seed"] == 0 and record["source"] == "measured"
    assert not list(root.rglob("*.unfinished"))
    assert collect([run], "reference").absent == [run]


def test_drift_has_a_row_for_every_module_in_order():
    found = ensure(DriftRun(TRAINED, n=2))
    layers = found["metrics"]["layers"]
    assert found["study"] == "drift"
    names = [row["layer"] for row in layers]
    assert list(dict.fromkeys(names)) == ["tokenizer", "block 1", "block 2", "norm", "pool", "head"]
    assert layers[-1]["node"] == "head"
    assert layers[-1]["error"] == pytest.approx(found["metrics"]["logit_error"], abs=1e-3)
    assert all(0 <= row["error"] < 0.05 and row["scale"] > 0 for row in layers)


def test_runs_of_different_kinds_are_told_apart():
    kinds = [TRAINED, EvaluationRun(TRAINED), DriftRun(TRAINED), PrivateRun(TRAINED.network)]
    assert len({store.key(run) for run in kinds}) == len({store.name(run)[-8:] for run in kinds}) == 4
    with pytest.raises(ValueError, match="n is 5000"):
        ensure(DriftRun(TRAINED, n=5000))


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1))


@pytest.mark.parametrize("protocol", ["stock", "tuned"])
def test_fractional_bits_are_those_asked_for(protocol):
    torch.manual_seed(0)
    network = Affine()
    images = torch.randn(4, 1, 8, 8)
    coarse, fine = (private.infer(network, images, protocol, bits=bits).error for bits in (8, 18))
    assert fine < 1e-3 < coarse < 0.2

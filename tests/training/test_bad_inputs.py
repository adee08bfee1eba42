"""Recipes, checkpoints and places that no training should begin with, and weights that none should end with."""

import pytest
import torch

from salvit_core import CCT, preset
from salvit_core.search import __main__ as search
from salvit_core.search.priced import PricedSearch
from salvit_core.search.sas import Search
from salvit_core.training import Recipe, fit
from salvit_core.training.__main__ import main
from salvit_core.training.checkpoint import load_weights

NAN, INF = float("nan"), float("inf")
RECIPE = Recipe(epochs=1, batch=2000, augment="none")


def network(seed=0):
    torch.manual_seed(seed)
    return CCT(preset("cct_2_3x1", "SA L2Q"))


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("epochs", 2.5, "is 2.5: give a whole number"),
        ("epochs", "3", "is '3': give a whole number"),
        ("seed", "abc", "is 'abc': give a whole number"),
        ("seed", -1, "is -1: give 0 or more"),
        ("augment", "x", "'x' is unknown: choose from none, crop, autoaugment"),
        ("distill_logits", -1, "is -1: give 0.0 or more"),
        ("bf16", "no", "is 'no': give True or False"),
        ("label_smoothing", NAN, "is nan: give a finite number"),
        ("label_smoothing", -1, "is -1: give 0.0 to less than 1.0"),
        ("clip", INF, "is inf: give a finite number"),
        ("lr", INF, "is inf: give a finite number"),
        ("temperature", 1e200, "is 1e[+]200: give at most"),  # its square is no float
        ("optimizer", ["adam"], "is .*: give a name"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(field, value, said):
    with pytest.raises(ValueError, match=f"^{field} {said}"):
        Recipe(**{field: value})


def test_the_last_step_may_lose_the_weights(few_digits, tmp_path):
    """One step at an endless rate: its loss was finite, what it leaves is not."""
    wild = Recipe(epochs=1, batch=2000, augment="none", lr=1e30)
    with pytest.raises(
        FloatingPointError, match="^validation_loss is nan after epoch 0 .*: lower lr, set clip"
    ) as lost:
        list(fit(network(), few_digits, wild, checkpoint=tmp_path / "run.pt"))
    assert "\n" not in str(lost.value) and not list(tmp_path.iterdir())


def test_a_weight_that_is_lost_stops_the_run_even_where_no_loss_sees_it(few_digits):
    model = network()
    model.register_buffer("unseen", torch.tensor([1.0, NAN]))
    with pytest.raises(FloatingPointError, match="weight unseen is not finite after epoch 0"):
        list(fit(model, few_digits, RECIPE))


@pytest.mark.parametrize(
    "options, said",
    [
        (["--lr", "1e30"], "error: cct_2_3x1-SA-softmax-digits-0: validation_loss is nan after epoch 0"),
        (["--label-smoothing", "nan"], "error: Error parsing recipe: label_smoothing is nan: give a finite number"),
        (["--clip", "inf"], "error: Error parsing recipe: clip is inf: give a finite number"),
        (["--image", "0"], "error: Error parsing Command: image is 0: give 1 or more, or None"),
        (["--out", "/proc/nothing"], "error: [Errno 2] cannot write /proc/nothing/checkpoint.pt"),
    ],
)
def test_the_command_leaves_no_result(tmp_path, capsys, options, said):
    few = ["--preset", "cct_2_3x1", "--data", "digits", "--epochs", "1", "--batch", "2000", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*few, *options])
    line = capsys.readouterr().err.strip() if ended.value.code == 2 else str(ended.value.code)
    assert line.startswith(said) and "\n" not in line
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("command", [main, search.main])
def test_a_place_that_takes_nothing_is_refused_before_training(tmp_path, monkeypatch, command):
    monkeypatch.setattr("salvit_core.training.loop.evaluate", lambda *a: pytest.fail("an epoch was trained"))
    (tmp_path / "file").write_text("theirs")
    words = ["--preset", "cct_2_3x1", "--data", "digits", "--epochs", "1"]
    words += ["--budget", "1", "--search-epochs", "1"] if command is search.main else []
    for out in ("file", "file/inside"):
        with pytest.raises(SystemExit, match="error: .*cannot write .*file.*: make room, or write elsewhere"):
            command([*words, "--out", str(tmp_path / out)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, few_digits):
    path = tmp_path_factory.mktemp("saved") / "run.pt"
    list(fit(network(), few_digits, RECIPE, checkpoint=path))
    return path


@pytest.mark.parametrize("part", ["identity", "model", "optimizer", "random", "history", "best"])
def test_a_checkpoint_that_lacks_a_part_says_so(saved, few_digits, tmp_path, part):
    content = torch.load(saved, weights_only=True)
    del content[part]
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=f"checkpoint .*run.pt lacks {part}: name another file or delete this one"):
        next(fit(network(), few_digits, RECIPE, checkpoint=tmp_path / "run.pt"))


@pytest.mark.parametrize("part, value", [("random", 3), ("history", 5), ("model", {}), ("optimizer", None)])
def test_a_checkpoint_with_a_part_that_does_not_fit_says_so(saved, few_digits, tmp_path, part, value):
    torch.save(torch.load(saved, weights_only=True) | {part: value}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="checkpoint .*run.pt does not fit .*: name another file or delete") as refused:
        next(fit(network(), few_digits, RECIPE, checkpoint=tmp_path / "run.pt"))
    assert "\n" not in str(refused.value)


def test_deleting_is_advised_only_where_decoding_failed(saved, few_digits, tmp_path, monkeypatch):
    for name in ("", "."):
        with pytest.raises(ValueError, match=f"checkpoint is '{name}': name a file"):
            next(fit(network(), few_digits, RECIPE, checkpoint=name))

    def closed(path):
        raise PermissionError(13, f"cannot read {path} (Permission denied): mend that")

    with monkeypatch.context() as patched:
        patched.setattr("salvit_core.workspace.readable", closed)
        with pytest.raises(OSError, match="Permission denied") as refused:
            next(fit(network(), few_digits, RECIPE, checkpoint=saved))
        assert "delete" not in str(refused.value)
    (tmp_path / "run.pt").write_bytes(saved.read_bytes()[:500])
    with pytest.raises(ValueError, match="run.pt is not a checkpoint of this program .*: delete it"):
        next(fit(network(), few_digits, RECIPE, checkpoint=tmp_path / "run.pt"))


def test_a_checkpoint_of_other_images_is_refused(saved, few_digits):
    few_digits.train.images[0, 0, 0, 0] += 1
    try:
        with pytest.raises(ValueError, match="its training images is"):
            next(fit(network(), few_digits, RECIPE, checkpoint=saved))
    finally:
        few_digits.train.images[0, 0, 0, 0] -= 1


def test_weights_that_do_not_fit_are_named(saved, tmp_path):
    weights = torch.load(saved, weights_only=True)["model"]
    path = tmp_path / "weights.pt"
    torch.save({name: tensor for name, tensor in weights.items() if name != "position"}, path)
    with pytest.raises(ValueError, match="the weights in .*weights.pt are of another network .*position") as refused:
        load_weights(network(), path)
    assert "\n" not in str(refused.value)
    torch.save(weights | {"head.bias": torch.full((10,), NAN)}, path)
    with pytest.raises(ValueError, match="head.bias in .*weights.pt is not finite"):
        load_weights(network(), path)
    path.write_bytes(b"\x80")
    with pytest.raises(ValueError, match="weights.pt is not a file of weights .*: delete it"):
        load_weights(network(), path)


# Searches


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(budget=3), "budget 3 cannot be met: the network has 2 layers"),
        (dict(budget=-1), "budget is -1: give 0 or more"),
        (dict(budget=1.0), "budget is 1.0: give a whole number"),
        (dict(weight=NAN), "weight is nan: give a finite number"),
        (dict(seed=None), "seed is None: give a whole number"),
        (dict(first=None), "first is None: give a Recipe"),
        (dict(rule="best"), "rule 'best' is unknown"),
        (dict(rule=3), "rule is 3: give a str or tuple"),
        (dict(rule=({},)), "rule .* is unknown: choose from top, bottom, random, or give a list"),
        (dict(rule=(0, 1)), "does not name 1 different layers"),
        (dict(granularity="head", budget=5), "budget 5 cannot be met: the network has 4 heads"),
    ],
)
def test_a_search_that_cannot_be_is_refused_when_it_is_made(changes, said):
    fields = dict(network=preset("cct_2_3x1"), first=RECIPE, finetune=RECIPE, budget=1)
    with pytest.raises(ValueError, match=said):
        Search(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(choices=("self", "sand")), "attention 'sand' is unknown"),
        (dict(choices="self"), "choices is 'self': give a tuple"),
        (dict(prices=(1.0, NAN)), "prices is .*nan.*: give a finite number"),
        (dict(prices=(1.0, 0)), "give one positive number for each"),
        (dict(budget=INF), "budget is inf: give a finite number"),
        (dict(weight=-1.0), "weight is -1.0: give 0.0 or more"),
    ],
)
def test_a_priced_search_that_cannot_be_is_refused_when_it_is_made(changes, said):
    fields = dict(network=preset("cct_2_3x1"), first=RECIPE, finetune=RECIPE)
    fields |= dict(choices=("self", "external"), prices=(2.0, 1.0), budget=3.0)
    with pytest.raises(ValueError, match=said):
        PricedSearch(**{**fields, **changes})


def test_a_result_holds_no_number_that_is_none(tmp_path, monkeypatch):
    """Whatever a training says, its file is JSON or is not there."""
    monkeypatch.setattr("salvit_core.training.__main__.train", lambda *a, **k: {"test_accuracy": 1.0, "lr": [INF]})
    with pytest.raises(SystemExit, match=r"error: lr\[0\] is inf, which .*result.json cannot hold"):
        main(["--preset", "cct_2_3x1", "--data", "digits", "--out", str(tmp_path)])
    assert not (tmp_path / "result.json").exists()

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from salvit_core import CCT, preset, training, workspace
from salvit_core import datasets as data
from salvit_core.training import Recipe, evaluate, fit, loop, train
from salvit_core.training import recipe as recipes
from salvit_core.training.__main__ import main
from salvit_core.training.preparation import optimizer

RECIPE = Recipe(epochs=4, batch=64, lr=4e-3, augment="none")
TIMES = ("seconds", "images_per_second")


def network(method="SA softmax", seed=0, **changes):
    torch.manual_seed(seed)
    return CCT(preset("cct_2_3x1", method, **changes))


def untimed(history):
    return [{name: value for name, value in facts.items() if name not in TIMES} for facts in history]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run(*arguments):
    command = [sys.executable, "-m", "salvit_core.training", "--preset", "cct_2_3x1", "--data", "digits", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# Learning


@pytest.mark.parametrize("method", ["SA softmax", "SA L2Q", "EA softmax", "EA L2Q"])
def test_tiny_training_learns(digits, method):
    result = train(network(method), digits, dataclasses.replace(RECIPE, epochs=8))
    losses = [facts["loss"] for facts in result["history"]]
    assert result["test_accuracy"] > 70  # chance: 10
    assert losses[-1] < 0.7 * losses[0]


def test_bf16_and_the_other_options_learn(digits, monkeypatch):
    for module in (loop, recipes):
        monkeypatch.setattr(module, "multiplies_bf16", lambda device: True)
    recipe = dataclasses.replace(
        RECIPE,
        bf16=True,
        channels_last=True,
        clip=1.0,
        optimizer="adam",
        weight_decay=0.0,
        decay_all=True,
        augment="crop",
    )
    result = train(network("SA L2Q"), digits, recipe)
    assert result["test_accuracy"] > 40 and result["bf16"]


def test_a_processor_that_would_imitate_bf16_trains_in_float32(few_digits, monkeypatch):
    histories = []
    for bf16, has in ((False, {}), (True, {"avx2": True}), (True, {"avx512_bf16": True})):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        result = train(network(), few_digits, dataclasses.replace(RECIPE, epochs=1, bf16=bf16))
        assert result["bf16"] is (bf16 and "avx512_bf16" in has)
        histories.append(untimed(result["history"]))
    assert histories[0] == histories[1] != histories[2]


def test_channels_last_changes_nothing_but_the_order_in_memory(few_digits):
    histories = [
        list(fit(network(), few_digits, dataclasses.replace(RECIPE, epochs=1, channels_last=last)))
        for last in (False, True)
    ]
    assert histories[0][0]["loss"] == pytest.approx(histories[1][0]["loss"], rel=1e-4)


def test_same_seed_same_history_other_seed_other_history(few_digits):
    recipe = dataclasses.replace(RECIPE, epochs=1, augment="crop")
    first, again = (untimed(fit(network(), few_digits, recipe)) for _ in range(2))
    other = untimed(fit(network(), few_digits, dataclasses.replace(recipe, seed=1)))
    assert first == again
    assert first != other


def test_warmup_and_cosine():
    recipe = Recipe(epochs=50, lr=1.0)
    rates = [training.learning_rate(recipe, epoch) for epoch in range(50)]
    assert rates[:10] == [1 / (10 - epoch) for epoch in range(10)]
    assert rates[10] == 1.0
    assert rates[30] == pytest.approx(0.5)
    assert 0 < rates[49] < 0.01
    assert training.learning_rate(Recipe(epochs=3), 0) == Recipe().lr  # too short a run to warm up


def test_loss_is_the_label_smoothed_mean_over_the_images(digits):
    recipe = dataclasses.replace(RECIPE, epochs=1, lr=1e-12, weight_decay=0.0, label_smoothing=0.2)
    model = network(attention_dropout=0.0, stochastic_depth=0.0)
    (facts,) = fit(model, digits, recipe)
    images, labels = next(data.batches(digits.train, 5000))
    with torch.no_grad():
        log = model(images).log_softmax(1)
    wanted = -(0.8 * log[range(len(labels)), labels] + 0.2 * log.mean(1)).mean()
    assert facts["loss"] == pytest.approx(wanted.item(), rel=1e-4)


def test_decay_spares_what_is_learnt_beside_the_weights():
    model = network("SA L2Q")
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, rest = optimizer(model, RECIPE).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (RECIPE.weight_decay, 0.0)
    assert {names[p].split(".")[-1] for p in decayed["params"]} == {"weight"}
    assert {names[p].split(".")[-1] for p in rest["params"]} == {"weight", "bias", "c", "d", "position"}
    assert all("norm" in names[p] for p in rest["params"] if names[p].endswith("weight"))
    (released,) = optimizer(model, dataclasses.replace(RECIPE, decay_all=True)).param_groups
    assert len(released["params"]) == len(names)
    assert released["weight_decay"] == RECIPE.weight_decay


def test_gradient_descent_of_some_parameters_goes_on_where_it_was(few_digits, tmp_path):
    """What it trains moves by the rate times its gradient, all else as without it; a stop changes nothing."""
    recipe = dataclasses.replace(RECIPE, epochs=2, sgd=("c", "blocks.1.attention"))
    model = network("SA L2Q")
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, rest, descending = optimizer(model, recipe).param_groups
    held = [name for name in names.values() if name.endswith(".c") or name.startswith("blocks.1.attention.")]
    assert sorted(names[p] for p in descending["params"]) == sorted(held)
    assert len(decayed["params"]) + len(rest["params"]) + len(held) == len(names) and not descending["weight_decay"]

    both, before = optimizer(model, recipe), {name: parameter.clone() for parameter, name in names.items()}
    model(torch.randn(8, 1, 8, 8)).square().sum().backward()
    both.step()
    for parameter, name in names.items():
        if name in held:
            torch.testing.assert_close(parameter, before[name] - recipe.lr * parameter.grad)

    whole, part = list(fit(network("SA L2Q"), few_digits, recipe)), tmp_path / "run.pt"
    next(fit(network("SA L2Q"), few_digits, recipe, checkpoint=part))
    assert untimed(fit(network("SA L2Q"), few_digits, recipe, checkpoint=part)) == untimed(whole)
    with pytest.raises(ValueError, match="its sgd is .'c', 'blocks.1.attention'., here ..;"):
        next(fit(network("SA L2Q"), few_digits, dataclasses.replace(recipe, sgd=()), checkpoint=part))
    with pytest.raises(ValueError, match="no trained parameter is called alpha: take it out of sgd"):
        optimizer(model, dataclasses.replace(recipe, sgd=("alpha", "c")))


def test_frozen_parameters_stay(few_digits):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(fit(model, few_digits, dataclasses.replace(RECIPE, epochs=1), frozen=("tokenizer", "position")))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name == "position" or name.startswith("tokenizer")), name
    with pytest.raises(ValueError, match="no parameter is called positions"):
        list(fit(model, few_digits, RECIPE, frozen=("positions",)))


# Measuring


def test_evaluate_counts_right_answers(digits):
    model = network()
    images = (digits.test.images.float() / 255 - digits.test.mean[0]) / digits.test.std[0]
    with torch.no_grad():
        logits = model.eval()(images)
    model.train()
    measured = evaluate(model, digits.test, batch=100)
    assert model.training
    assert measured["accuracy"] == pytest.approx(100 * (logits.argmax(1) == digits.test.labels).double().mean().item())
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits, digits.test.labels).item(), rel=1e-5)


def test_best_epoch_is_kept_and_the_test_set_is_touched_once(few_digits, monkeypatch):
    # Validation says that the second of four epochs is best.
    accuracies, seen = iter([10.0, 90.0, 50.0, 90.0]), []

    def measured(model, split, *rest):
        seen.append(split)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"loss": 1.0, "accuracy": next(accuracies, 77.0), "top5": 99.0}

    for keep, epoch in (("best", 1), ("last", 3)):
        accuracies, seen, states, model = iter([10.0, 90.0, 50.0, 90.0]), [], [], network()
        monkeypatch.setattr(loop, "evaluate", measured)
        result = train(model, few_digits, dataclasses.replace(RECIPE, keep=keep))
        assert result["best_epoch"] == epoch
        assert same(model.state_dict(), states[epoch])
        assert seen == [few_digits.validation] * 4 + [few_digits.test]
        assert (result["validation_accuracy"], result["test_accuracy"]) == (90.0, 77.0)


def test_the_result_is_plain_data(few_digits):
    result = train(network(), few_digits, dataclasses.replace(RECIPE, epochs=1))
    assert json.loads(json.dumps(result))["config"]["attention"] == ["self", "self"]
    assert {"lr", "loss", "cross_entropy", "validation_loss", "validation_accuracy", *TIMES} < set(result["history"][0])


def test_training_is_silent_without_a_terminal(few_digits, capfd):
    train(network(), few_digits, dataclasses.replace(RECIPE, epochs=1))
    assert capfd.readouterr() == ("", "")


# Distillation


@pytest.fixture(scope="module")
def teacher(digits):
    model = network()
    train(model, digits, dataclasses.replace(RECIPE, epochs=8))
    with torch.no_grad():  # calls every digit by the next one's name: nobody comes close to it by learning the labels
        model.head.weight.copy_(model.head.weight.roll(1, 0))
        model.head.bias.copy_(model.head.bias.roll(1, 0))
    return model


@pytest.mark.parametrize("part", ["distill_logits", "distill_features"])
def test_distillation_brings_the_student_closer_to_the_teacher(digits, teacher, part):
    images, _ = next(data.batches(digits.validation, 500))
    distances = []
    for weight in (0.0, 10.0):
        student = network("SA 2Quad", seed=1)
        recipe = dataclasses.replace(RECIPE, keep="last", **{part: weight})
        history = list(fit(student, digits, recipe, teacher=teacher if weight else None))
        student.eval()
        with torch.no_grad():
            if part == "distill_features":
                distances.append(F.mse_loss(student.features(images), teacher.features(images)).item())
            else:
                targets = teacher(images).softmax(1)
                distances.append(F.kl_div(student(images).log_softmax(1), targets, reduction="batchmean").item())
    assert distances[1] < 0.6 * distances[0]
    assert history[-1][part] < history[0][part]
    assert history[0]["loss"] == pytest.approx(history[0]["cross_entropy"] + history[0][part])


def test_teachers_that_do_not_fit_are_refused(digits, teacher):
    recipe = dataclasses.replace(RECIPE, distill_logits=1.0, distill_features=1.0)
    for model, teacher_given, recipe_given, reason in (
        (network(), None, recipe, "no teacher is given"),
        (network(), teacher, RECIPE, "a teacher is given"),
        (network(classes=7), teacher, recipe, "classes is 10, the model's 7"),
        (network(width=64), teacher, recipe, "width is 32, the model's 64"),
    ):
        with pytest.raises(ValueError, match=reason):
            next(fit(model, digits, recipe_given, teacher=teacher_given))


# Stopping and going on


@pytest.mark.processes
def test_killed_at_any_moment_it_goes_on_to_the_same_end(tmp_path):
    arguments = ["--method", "SA L2Q", "--epochs", "12", "--batch", "64", "--lr", "4e-3", "--augment", "crop"]
    done = run(*arguments, "--out", str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar without a terminal

    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    command = [sys.executable, "-m", "salvit_core.training", "--preset", "cct_2_3x1", "--data", "digits", *arguments]
    found = []
    for delay in (0.0, 0.07):
        process = subprocess.Popen([*command, "--out", str(checkpoint.parent)], stdout=subprocess.DEVNULL)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay)  # into the next epoch, or into the writing of its checkpoint
        process.kill()
        assert process.wait() == -signal.SIGKILL
        found.append(torch.load(checkpoint, weights_only=True)["epoch"])
    assert 0 <= found[0] < found[1] < 11
    assert run(*arguments, "--out", str(checkpoint.parent)).returncode == 0

    whole, killed = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed"))
    assert untimed(killed["history"]) == untimed(whole["history"])
    assert killed["test_loss"] == whole["test_loss"]
    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert same(whole["model"], killed["model"])
    assert same(whole["best"], killed["best"])


def test_a_finished_run_is_read_not_repeated(few_digits, tmp_path):
    first, second = network(), network(seed=5)
    results = [train(model, few_digits, RECIPE, checkpoint=tmp_path / "run.pt") for model in (first, second)]
    assert results[0] == results[1]  # seconds included: they were not spent again
    assert same(first.state_dict(), second.state_dict())


def test_a_checkpoint_of_another_run_is_refused_in_one_line(digits, teacher, tmp_path):
    path = tmp_path / "run.pt"
    recipe = dataclasses.replace(RECIPE, epochs=1)
    list(fit(network(), digits, recipe, checkpoint=path))
    others = [
        (network(), dataclasses.replace(recipe, lr=5e-3), {}, "its lr is 0.004, here 0.005"),
        (network("EA softmax"), recipe, {}, "its attention is .*self.*, here .*external"),
        (network(width=64), recipe, {}, "its width is 32, here 64"),
        (network(), recipe, {"frozen": ("head",)}, "its frozen is"),
    ]
    for model, other, options, reason in others:
        with pytest.raises(ValueError, match=reason) as caught:
            next(fit(model, digits, other, checkpoint=path, **options))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="its training labels is"):
        next(fit(network(), data.load("digits", seed=1), recipe, checkpoint=path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a checkpoint") as caught:
        next(fit(network(), digits, recipe, checkpoint=path))
    assert "\n" not in str(caught.value)


class Poison:
    """A penalty that is not a number from the given call on."""

    def __init__(self, call):
        self.calls, self.call = 0, call

    def __call__(self):
        self.calls += 1
        return torch.tensor(float("nan") if self.calls > self.call else 0.0)

    def facts(self):
        return {"calls": self.calls}


def test_a_loss_that_is_not_a_number_stops_the_run(digits, tmp_path):
    steps = -(-len(digits.train.labels) // RECIPE.batch)
    run = fit(network(), digits, RECIPE, penalty=Poison(steps + 7), checkpoint=tmp_path / "run.pt")
    assert next(run)["calls"] == steps
    with pytest.raises(FloatingPointError, match="penalty is nan at epoch 1, step 7 "):
        next(run)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 0  # the last sound state is still there


# Several processes

TORCHRUN_SCRIPT = """
import sys
from salvit_core.models.config import PRESETS
from salvit_core.training.__main__ import main
# Each process drops out on its own; without, the processes compute what one computes.
PRESETS["cct_2_3x1"] |= dict(attention_dropout=0.0, stochastic_depth=0.0)
main(sys.argv[1:])
"""


@pytest.mark.processes
def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN_SCRIPT)
    # 65 does not divide by 2, nor 1294 images by 65: unequal slices.
    arguments = [
        "--preset",
        "cct_2_3x1",
        "--data",
        "digits",
        "--epochs",
        "3",
        "--batch",
        "65",
        "--lr",
        "4e-3",
        "--augment",
        "crop",
    ]
    # Clipping, because Adam would not notice a gradient that is wrong by a constant factor.
    arguments += ["--method", "SA L2Q", "--device", "cpu", "--clip", "1.0"]
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    histories = {}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, str(script), *arguments, "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test accuracy") == 1
        histories[name] = json.loads((tmp_path / name / "result.json").read_text())["history"]
    assert len(torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["random"]) == 2
    for one, two in zip(histories["one"], histories["two"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-3)


# The command line and the recipe


@pytest.mark.parametrize(
    "wrong, said",
    [
        (("--method", "SA hardmax"), "error: method 'SA hardmax' is unknown: choose from SA softmax, "),
        (("--preset", "cct_99"), "error: preset 'cct_99' is unknown: choose from cct_2_3x1, "),
        (("--device", "cuda:99"), "error: device 'cuda:99' cannot be used here"),
        (("--device", "gpu"), "error: device 'gpu' cannot be used here"),
    ],
)
def test_the_command_line_refuses_in_one_line(tmp_path, wrong, said):
    with pytest.raises(SystemExit) as ended:
        main(["--data", "digits", "--out", str(tmp_path), *wrong])
    assert str(ended.value.code).startswith(said) and "\n" not in ended.value.code


@pytest.mark.processes
def test_an_error_ends_the_process_with_one_line(tmp_path):
    done = run("--method", "SA hardmax", "--out", str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("error: method 'SA hardmax' is unknown")
    assert done.stderr.count("\n") == 1


def test_a_result_says_how_its_epoch_was_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    for protocol in ("held-out", "released"):
        main(["--preset", "cct_2_3x1", "--data", "digits", "--epochs", "1", "--protocol", protocol])
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("result.json"))]
    assert [result["protocol"] for result in results] == ["held-out", "released"]


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"optimizer": "sgd"}, "optimizer 'sgd' is unknown: choose from adamw, adam"),
        ({"keep": "first"}, "keep 'first' is unknown"),
        ({"epochs": 0}, "epochs is 0: give 1 or more"),
        ({"lr": -1.0}, "lr is -1.0: give a positive number"),
        ({"lr": float("nan")}, "lr is nan"),
    ],
)
def test_a_wrong_recipe_is_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        Recipe(**wrong)


@pytest.mark.processes
def test_training_needs_no_crypten():
    blocked = ["crypten", "pandas", "psutil", "matplotlib", "seaborn", "papermill", "IPython", "joblib", "cryptography"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code += "import salvit_core.training.loop, salvit_core.search.sas"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
    code = "import sys, salvit_core.search.sas, salvit_core.training; print([m for m in sys.modules if 'crypten' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"

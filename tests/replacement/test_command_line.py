"""`salvit replace`: its four modes one after the other, the published command lines, and what is refused."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from salvit_core import ViT, build, cli, preset
from salvit_core.models import cost
from salvit_core.replacement import __main__ as replacement
from salvit_core.training.__main__ import main as train

QUICK = ["--augment", "none", "--reprob", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("replace")
    train(
        f"--preset cct_2_3x1 --data digits --epochs 6 --batch 64 --lr 4e-3 --augment none --out {made}/teacher".split()
    )
    options = "--epochs 2 --batch-size 64 --lr 3e-2 --block-ft-epochs 1 --block-ft-lr 2e-3 --block-ft-batch-size 64"
    cli.main(f"replace train --run {made}/teacher --out {made}/far {options} --head-epochs 1".split() + QUICK)
    return made


def said(folder):
    return json.loads((folder / "result.json").read_text())


def test_train_replaces_attention(folder):
    result = said(folder / "far")
    assert result["config"]["attention"] == ["multi_lstm", "multi_lstm"] and result["teacher"] == "teacher"
    assert list(result["stages"]) == ["attention", "blocks", "head"]
    attention = result["distillation"]["attention"]
    assert attention["lr"] == pytest.approx(3e-2 * 64 / 512) and attention["augment"] == "none"
    assert result["distillation"]["blocks"]["lr"] == 2e-3
    model, _ = replacement.restored(folder / "far")
    assert cost.parameters(model) > cost.parameters(replacement.restored(folder / "teacher")[0])


def test_prune_removes_units_and_evaluate_reads_the_smaller_network(folder, capsys):
    cli.main(f"replace prune --model-path {folder}/far --share 0.5 --epochs 1 --finetune-epochs 1 --lr 2e-3 "
             f"--batch-size 64 --out {folder}/small".split() + QUICK)  # fmt: skip
    assert "64 of 128 hidden units removed" in capsys.readouterr().out
    result = said(folder / "small")
    assert result["parameters"] < result["parameters_before"]
    assert sum(sum(pair) for layer in result["hidden"] for pair in layer) == 64
    model, data = cli.subject(cli.Infer(run=folder / "small"))
    assert cost.parameters(model) == result["parameters"] and data.name == "digits"


def test_downstream_has_a_new_head(folder):
    source = folder / ("small" if (folder / "small").exists() else "far")
    options = "--epochs 1 --batch-size 64 --lr 1e-3 --augment none --dataset digits"
    cli.main(f"replace downstream --ds-pruned {source} {options} --out {folder}/down --head-only".split())
    before, after = (replacement.restored(each)[0].state_dict() for each in (source, folder / "down"))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"head.weight", "head.bias"}
    assert said(folder / "down")["stages"]["downstream"]["test_accuracy"] == said(folder / "down")["test_accuracy"]


def test_two_networks_carried_into_one_folder_each_have_their_own_result(folder, tmp_path):
    """A result of the other is not overwritten; its checkpoint, of the same sizes, not gone on from."""
    options = f"--epochs 1 --batch-size 64 --augment none --dataset digits --out {tmp_path}".split()
    ends = []
    for seed in (1, 2, 1):
        source = tmp_path / str(seed) / "far"
        if not source.exists():
            words = f"train --run {folder}/teacher --out {source} --epochs 1 --block-ft-epochs 0 --head-epochs 0"
            cli.main(["replace", *words.split(), "--seed", str(seed), *QUICK])
        command = ["replace", "downstream", "--run", str(source), *options]
        if ends:
            with pytest.raises(SystemExit, match="result.json is another result, by its made: give another"):
                cli.main(command)
            (tmp_path / "result.json").unlink()
        cli.main(command)
        cli.main(command)  # its own is gone on from
        ends.append(torch.load(tmp_path / "weights.pt", weights_only=True))
    one, other, again = ends
    name = "blocks.0.attention.lower.weight"  # drawn by each for itself, and far apart after one epoch
    assert (one[name] - other[name]).abs().mean() > 0.01
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())  # from its own checkpoint


def test_downstream_has_as_many_classes_as_the_other_data_set(folder, tmp_path, monkeypatch):
    def pairs(*arguments, real=replacement.datasets.load, **options):
        found = real(*arguments, **options)
        parts = {
            part: dataclasses.replace(getattr(found, part), labels=getattr(found, part).labels // 2)
            for part in ("train", "validation", "test")
        }
        return dataclasses.replace(found, name="pairs", classes=5, **parts)

    monkeypatch.setattr(replacement.datasets, "load", pairs)
    options = "--epochs 8 --batch-size 64 --lr 4e-3 --augment none --dataset digits"
    cli.main(f"replace downstream --run {folder}/far {options} --out {tmp_path}".split())
    model, result = replacement.restored(tmp_path)
    assert model.config.classes == 5 == len(model.head.weight) and result["data"] == "pairs"
    assert result["test_accuracy"] > 40  # of five, 20 by chance


def test_names_of_results_tell_options_apart(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(replacement.workspace, "ROOT", tmp_path)
    monkeypatch.setattr(replacement, "distil", lambda run, teacher, data, out: made.append(out) or {"network": teacher})
    monkeypatch.setattr(replacement, "prune", lambda run, model, data, out: made.append(out) or stop())
    monkeypatch.setattr(replacement, "_written", lambda out, *rest: out)
    made = []

    class Stopped(ValueError):
        pass

    def stop():
        raise Stopped

    for words in ("", "--layers 1", "--skip-train-attn", "--epochs 9", ""):
        replacement.main(f"train --run {folder}/teacher {words}".split())
    for words in ("", "--seed 1", "--threshold 0.1", "--coefficient 0.1", "--finetune-epochs 0", ""):
        with pytest.raises(SystemExit):
            replacement.main(f"prune --run {folder}/far {words}".split())
    assert made[0] == made[4] and made[5] == made[10] and len(set(made)) == 9


def test_a_network_that_read_resized_images_reads_them_on_shares(tmp_path):
    train(f"--preset cct_2_3x1 --data digits --image 16 --epochs 1 --augment none --out {tmp_path}/wide".split())
    for command in (cli.Infer, cli.Evaluate):
        model, data = cli.subject(command(run=tmp_path / "wide"))
        assert model.config.image == data.test.images.shape[-1] == 16
    assert model(data.test.normalised(data.test.images[:2])).shape == (2, 10)


def test_a_network_of_another_kind_is_refused_in_one_line(tmp_path):
    model = build(preset("efficientvit_test"))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    said = {"config": dataclasses.asdict(model.config), "data": "digits"}
    (tmp_path / "result.json").write_text(json.dumps(said))
    for mode in ("train", "prune", "downstream --data digits", "visualize"):
        with pytest.raises(SystemExit) as ended:
            cli.main(f"replace {mode} --run {tmp_path}".split())
        assert "is a EfficientViT: give a CCT or a ViT" in str(ended.value), mode


def test_visualize_draws_and_writes_numbers(folder):
    cli.main(f"replace visualize --run {folder}/far --n 4 --out {folder}/seen".split())
    for name in ("tokens.png", "patches.png"):
        assert (folder / "seen" / name).stat().st_size > 5000
    found = json.loads((folder / "seen" / "importance.json").read_text())
    assert list(found["importance"]) == ["block 1", "block 2"] and len(found["importance"]["block 1"]) == 16


@pytest.mark.parametrize(
    "words",
    [
        "train --rep-by multi-lstm --base-model DeiT-Base --batch-size 64 --block-ft-lr 2e-5 --block-ft-batch-size 64 "
        "--skip-train-attn",
        "train --rep-by multi-lstm --scale Small",
        "train --rep-by multi-lstm --base-model DeiT-Tiny",
        "prune --batch-size 64 --model-path there",
        "downstream --dataset cifar100 --lr 5e-5 --epochs 1000 --reprob 0.0 --drop-path 0.0",
        "downstream --ds-pruned there --dataset cars --lr 5e-5 --epochs 1000 --reprob 0.0 --drop-path 0.0",
        "visualize",
    ],
)
def test_the_published_command_lines_are_understood(words, monkeypatch):
    begun = []
    monkeypatch.setattr(replacement, "run", begun.append)
    monkeypatch.setattr(cli, "visualize", begun.append)
    cli.main(["replace", *words.split()])
    (command,) = begun
    if "skip" in words:
        assert command.skip_train_attn and command.block_ft_lr == 2e-5 and command.batch_size == 64
        assert command.base_model == "DeiT-Base"
    if "Small" in words:
        assert command.base_model == "Small"
    if "ds-pruned" in words:
        assert str(command.run) == "there" and command.data == "cars"


def test_a_deit_is_a_teacher_by_name_with_weights_from_a_file(tmp_path):
    """Of two layers and 16 pixels, that it may be trained here; under timm's names."""
    names = {"tokenizer.class_token": "cls_token", "position": "pos_embed", "tokenizer.embed": "patch_embed.proj"}
    names |= {"attention.qkv": "attn.qkv", "attention.projection": "attn.proj", "expand": "fc1", "contract": "fc2"}
    torch.manual_seed(0)
    model = ViT(preset("deit_tiny", image=32, classes=10))
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    torch.save({"model": state}, tmp_path / "deit.pth")
    for name in ("DeiT-Tiny", "Tiny"):
        found = replacement.named(name, tmp_path / "deit.pth")
        images = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(found(images), model.eval()(images))
    with pytest.raises(ValueError, match="the weights are not those of this ViT"):
        replacement.named("DeiT-Small", tmp_path / "deit.pth")


@pytest.mark.parametrize(
    "words, message",
    [
        ("train", "run is None, base model None: give one of both as the teacher"),
        ("train --base-model DeiT-Huge --weights w.pt", "base model 'DeiT-Huge' is unknown: choose from DeiT-Tiny"),
        ("train --base-model DeiT-Tiny", "weights is None: give the file with those of DeiT-Tiny"),
        ("train --run nowhere", "run nowhere holds no result.json"),
        ("train --run {teacher} --rep-by sand", "rep-by 'sand' is unknown: choose from"),
        ("train --run {teacher} --rep-by self", "the teacher's attention is 'self' already"),
        ("train --run {teacher} --data cifar10", "cifar10 has images of 3 channels"),
        ("train --run {teacher} --block-ft-epochs 0 --head-epochs 0 --skip-train-attn", "at least one stage"),
        ("prune", "run is None: give a folder"),
        ("prune --run {teacher}", "attention is self: hidden units are pruned of multi_lstm"),
        ("downstream --run {teacher}", "dataset is None: name the other data set"),
        ("visualize --run {far} --block 3", "block is 3: the network has 2"),
        ("visualize --run {far} --n 9999", "n is 9999: the test split of digits has 359 images"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, words, message, tmp_path, monkeypatch):
    if "cifar10" in words and not (replacement.workspace.ROOT / "data" / "cifar-10-batches-py").is_dir():
        pytest.skip("needs CIFAR-10")
    words = words.format(teacher=folder / "teacher", far=folder / "far").split()
    with pytest.raises(SystemExit) as ended:
        cli.main(["replace", *words, *(["--out", str(tmp_path / "out")] if "--run" in words else [])])
    assert str(ended.value).startswith("error: ") and message in str(ended.value) and "\n" not in str(ended.value)


@pytest.mark.processes
def test_processes_of_torchrun_share_the_work(folder, tmp_path):
    """And end with one result, whose losses are those of one process but for rounding: dropout is off."""
    options = f"train --teacher {folder}/teacher --rep-by multi-lstm --epochs 1 --batch-size 64 --lr 3e-2 --drop-path 0"
    options = [*options.split(), *QUICK, "--block-ft-epochs", "1", "--block-ft-batch-size", "64", "--head-epochs", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29641"]
    done = subprocess.run(
        [*command, "-m", "salvit_core.replacement", *options, "--out", str(tmp_path / "two")],
        **dict(capture_output=True, text=True, timeout=300),
    )
    assert done.returncode == 0, done.stderr
    cli.main(["replace", *options, "--out", str(tmp_path / "one")])
    for name, stage in said(tmp_path / "one")["stages"].items():
        other = said(tmp_path / "two")["stages"][name]
        assert [facts["loss"] for facts in other["history"]] == pytest.approx(
            [f["loss"] for f in stage["history"]], 1e-3
        )
        assert other["test_accuracy"] == pytest.approx(stage["test_accuracy"], abs=2)
    assert done.stdout.count("test accuracy") == 1


@pytest.mark.processes
def test_killed_at_any_moment_it_goes_on_to_the_same_end(folder, tmp_path):
    """In the first stage, in the second, and whenever half a second later is."""
    options = f"train --teacher {folder}/teacher --epochs 3 --batch-size 64 --lr 3e-2 --block-ft-epochs 3".split()
    options += ["--block-ft-batch-size", "64", "--head-epochs", "2", *QUICK]
    cli.main(["replace", *options, "--out", str(tmp_path / "whole")])
    command = [sys.executable, "-m", "salvit_core.replacement", *options, "--out", str(tmp_path / "parts")]
    hit = 0
    for wanted in ("attention_*.pt", "blocks_*.pt", "blocks_*.pt"):
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 120
        while not list((tmp_path / "parts").glob(wanted)) and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        started.kill()
        hit += started.wait() < 0  # else it had ended by itself
    assert hit
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, parts = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())

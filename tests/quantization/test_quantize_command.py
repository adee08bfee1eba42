"""`salvit quantize`: the released command's options, ImageNet's layout, our own trainings, and what is refused."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from salvit_core import build, cli, preset, workspace
from salvit_core.options import parsed
from salvit_core.quantization import Quantization, load
from salvit_core.quantization.__main__ import Command, named
from salvit_core.quantization.layers import layers_of
from salvit_core.training.__main__ import main as train

RELEASED = (
    "--n_bits_w 8 --channel_wise --weight 0.5 --model b1-r224 --disable_8bit_head_stem --n_bits_a 8 --act_quant "
    "--input_size 224 --test_before_calibration --data_path /imagenet"
)
OURS = (
    "--bits-weights 8 --per-channel --regulariser 0.5 --model efficientvit_b1 --same-ends --bits-activations 8 "
    "--activations --image 224 --test-before --data-path /imagenet"
)
BRIEF = ["--images", "8", "--iterations", "3", "--iterations-activations", "2"]


def test_the_released_command_is_understood():
    theirs, ours = (parsed(Command, "salvit quantize", words.split()) for words in (RELEASED, OURS))
    assert theirs.model == "b1-r224" and named("b1-r224", 224) == {"name": ours.model, "image": 224}
    assert dataclasses.replace(theirs, model=ours.model) == ours
    wanted = Quantization(8, 8, activations=True, per_channel=True, same_ends=True, regulariser=0.5)
    assert theirs.options == wanted and theirs.test_before and theirs.image == 224
    words = "--n_bits_w 4 --no-channel_wise --weight 0.01 --no-act_quant"
    other = parsed(Command, "salvit quantize", words.split())
    assert other.options == Quantization(4, activations=False, per_channel=False, regulariser=0.01)


def test_help_says_the_counterpart(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        cli.main(["quantize", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for option in [word for word in RELEASED.split() if word.startswith("--")]:
        assert option in said, option
    assert "salvit quantize --data-path PATH_TO_IMAGENET --bits-weights 8 --per-channel" in said


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Two classes of pictures that differ in colour, in ImageNet's layout; not square, of several sizes."""
    folder = tmp_path_factory.mktemp("imagenet")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("val", 5)):
        for place, name in enumerate(("n01440764", "n01443537")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 120, (70 + i, 90, 3), generator=generator, dtype=torch.uint8)
                pixels[..., place] += 120
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{i}.JPEG")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of B0 for two classes, under other names and in a dict, as the released files are."""
    torch.manual_seed(0)
    state = build(preset("efficientvit_b0", image=64, classes=2)).state_dict()
    path = tmp_path_factory.mktemp("weights") / "b0.pt"
    torch.save({"state_dict": {f"backbone.{i}.{name}": each for i, (name, each) in enumerate(state.items())}}, path)
    return path


def test_imagenet_in_its_usual_layout(imagenet, weights, tmp_path, capsys):
    words = f"quantize --data_path {imagenet} --n_bits_w 8 --channel_wise --weight 0.5 --model b0-r64 --n_bits_a 8"
    words += f" --disable_8bit_head_stem --act_quant --input_size 64 --test_before_calibration --weights {weights}"
    cli.main([*words.split(), *BRIEF, "--out", str(tmp_path), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    for line, stage in zip(
        lines,
        ("in float", "rounded to the nearest", "weights quantized", "weights and activations quantized"),
        strict=False,
    ):
        assert line.startswith("accuracy") and stage in line
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["accuracy"]) == ["float", "nearest", "weights", "activations"]
    assert result["options"]["same_ends"] and result["options"]["images"] == 8
    network, options = load(tmp_path / "quantized.pt")
    assert network.config == preset("efficientvit_b0", image=64, classes=2) and options.bits_weights == 8
    assert not (tmp_path / "weights.pt").exists()  # progress goes when all is done


@pytest.mark.parametrize("preset, blocks", [("efficientvit_test", 8), ("cct_2_3x1", None)])
def test_one_of_our_trainings(preset, blocks, tmp_path, capsys):
    words = f"--preset {preset} --data digits --epochs 3 --batch 64 --lr 4e-3 --augment none --device cpu"
    train([*words.split(), "--out", str(tmp_path / "trained")])
    capsys.readouterr()
    words = f"quantize --run {tmp_path / 'trained'} --out {tmp_path / 'out'} --device cpu --bits-weights 4 --images 64"
    words += " --iterations 20 --iterations-activations 5 --test-images 100"
    cli.main(words.split())
    said = capsys.readouterr().out
    assert "nearest" not in said and said.count("accuracy") == 3
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    network, _ = load(tmp_path / "out" / "quantized.pt")
    blocks = blocks or len(list(layers_of(network)))  # each layer is a block of its own
    assert found["data"] == "digits" and len(found["history"]) == 2 * blocks
    if preset == "efficientvit_test":
        assert found["accuracy"]["float"] > 60
    with pytest.raises(SystemExit, match="is another result, by its images and options: give another --out"):
        cli.main([*words.split(), "--seed", "1"])


def test_other_weights_have_another_folder(imagenet, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    state = torch.load(weights)
    torch.save({"state_dict": {name: each * 0.9 for name, each in state["state_dict"].items()}}, tmp_path / "other.pt")
    words = f"quantize --model b0-r64 --data-path {imagenet} --no-reconstruction --images 8 --device cpu"
    for file in (weights, tmp_path / "other.pt"):
        cli.main([*words.split(), "--weights", str(file)])
    assert len(list((tmp_path / "data" / "runs" / "quantizations").glob("*64px*/result.json"))) == 2


@pytest.mark.parametrize(
    "content",
    [{"state_dict": [1, 2]}, {"state_dict": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(0)}, {"a": 1}, {}],
)
def test_a_file_without_weights_is_one_line(content, tmp_path):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(SystemExit, match="bad.pt is not a file of weights: name another"):
        cli.main(f"quantize --model b0-r64 --weights {tmp_path / 'bad.pt'}".split())


@pytest.mark.parametrize(
    "words, said",
    [
        ("--model b1-r224 --image 256", "b1-r224 is for images of 224 pixels, image is 256: leave one out"),
        ("--model b9-r224", "model 'b9-r224' is unknown: choose from efficientvit_test"),
        ("--model b1-r224", "trained weights .*data/weights/b1-r224.pt are missing: put them there, or name others"),
        ("--run nowhere", "run nowhere holds no result.json"),
    ],
)
def test_refused_in_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=said):
        cli.main(["quantize", *words.split()])


def test_a_wrong_option_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["quantize", "--n_bits_w", "0"])
    assert ended.value.code == 2 and "bits_weights is 0: give 1 to 16" in capsys.readouterr().err


def test_weights_of_another_network_and_missing_images_are_refused(weights, tmp_path):
    with pytest.raises(SystemExit, match="are not those of this EfficientViT"):
        cli.main(f"quantize --model efficientvit_b1 --weights {weights}".split())
    words = f"quantize --model b0-r64 --weights {weights} --data-path {tmp_path} --out {tmp_path / 'out'}"
    with pytest.raises(SystemExit, match="train is missing: get the images"):
        cli.main(words.split())
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(SystemExit, match="text.pt is not a file of weights"):
        cli.main(f"quantize --model b0-r64 --weights {tmp_path / 'text.pt'}".split())


def test_more_calibration_images_than_there_are(imagenet, weights, tmp_path):
    words = f"quantize --model b0-r64 --weights {weights} --data-path {imagenet} --out {tmp_path}"
    with pytest.raises(SystemExit, match="1024 images: .*train has 24, give at most as many"):
        cli.main(words.split())

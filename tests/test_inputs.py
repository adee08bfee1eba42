"""A sweep of generated values over configurations and command lines: right, or refused in one line that names them."""

import dataclasses
import inspect
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from salvit_core import CCT, PRESETS, ViT, build, cli, config_of, cost, datasets, preset, private, workspace
from salvit_core.experiments import calibration, evidence, study
from salvit_core.experiments.profiles import Profile, profile
from salvit_core.models.config import CCTConfig, ViTConfig
from salvit_core.private.parties import launch
from salvit_core.private.protocol import LIMIT, ROLES
from salvit_core.replacement import __main__ as replacement
from salvit_core.search.priced import PricedSearch
from salvit_core.search.released import ReleasedSearch
from salvit_core.search.sas import Search
from salvit_core.training import Recipe

SWEEP = settings(
    derandomize=True,
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
RECIPE = Recipe(epochs=1, batch=64, augment="none")

# What a clumsy or a hostile user gives: other types, what is not finite, what is too small or too large by far.
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([2**20 + 1, 2**31, 2**63, 10**30, -(2**63)])
    | st.floats()
    | st.sampled_from(["", "self", "l2q", "adam", "no", "32", "nan", "a\nb", "{x}", "-"])
    | st.lists(st.none() | st.integers(-1, 2) | st.sampled_from(["self", "external"]), max_size=3)
    | st.tuples(st.sampled_from(["self", "x"]), st.sampled_from(["external", "self"]))
    | st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=1)
    | st.just(object)
)


def changed(kind):
    """One or two fields of a dataclass, changed to anything."""
    names = st.sampled_from([field.name for field in dataclasses.fields(kind)])
    return st.dictionaries(names, VALUES, min_size=1, max_size=2)


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def made_or_refused(make, changes):
    """What is made, whose numbers are then finite; or None, refused in one line that names a changed field."""
    try:
        made = make(**changes)
    except ValueError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 600, line
        assert any(name in line for name in changes), (line, changes)
        return None
    assert finite(dataclasses.asdict(made))
    return made


@pytest.mark.parametrize("name, kind", [("cct_2_3x1", CCTConfig), ("vit_2", ViTConfig)])
@SWEEP
@given(data=st.data())
def test_a_configuration_is_refused_or_can_be_built(name, kind, data):
    changes = data.draw(changed(kind))
    config = made_or_refused(lambda **fields: preset(name, "SA L2Q", **fields), changes)
    small = config and max(config.width, config.tokens, config.memory, config.image, config.layers) < 100
    if small and max(config.classes, config.channels) < 2**21:
        with torch.device("meta"):
            images = torch.zeros(1, config.channels, config.image, config.image)
            assert build(config)(images).shape == (1, config.classes)


@SWEEP
@given(name=VALUES | st.sampled_from(list(PRESETS)), method=VALUES | st.sampled_from(["SA L2Q", "SAL-ViT B=2"]))
def test_a_preset_is_known_or_refused(name, method):
    try:
        preset(name, method)
    except ValueError as error:
        assert "\n" not in str(error) and ("is unknown: choose from" in str(error) or "a budget of" in str(error))


@SWEEP
@given(changes=changed(Recipe))
def test_a_recipe_is_refused_or_whole(changes):
    made_or_refused(Recipe, changes)


@pytest.mark.parametrize("kind", [Search, ReleasedSearch, PricedSearch])
@SWEEP
@given(data=st.data())
def test_a_search_is_refused_or_whole(kind, data):
    fields = dict(network=preset("cct_2_3x1"), first=RECIPE, finetune=RECIPE)
    priced = dict(choices=("self", "external"), prices=(2.0, 1.0), budget=3.0)
    fields |= priced if kind is PricedSearch else dict(budget=1)
    changes = data.draw(changed(kind))
    if "network" in changes:  # said as "the search is over a CCT's attention: NoneType is of another network"
        with pytest.raises(ValueError, match="the search is over a CCT's attention"):
            kind(**{**fields, **changes})
        return
    made = made_or_refused(lambda **changes: kind(**{**fields, **changes}), changes)
    if made is not None and kind is not PricedSearch:
        assert 0 <= made.budget <= (2 if made.granularity == "layer" else 4)


@SWEEP
@given(changes=changed(Profile))
def test_a_profile_is_refused_or_whole(changes):
    made_or_refused(lambda **changes: dataclasses.replace(profile("smoke"), **changes), changes)


# Calls

TINY = preset("cct_2_3x1", "SA L2Q", layers=1)


class Began(BaseException):
    """The work itself, which this does not do."""


def begins(*arguments, **options):
    raise Began


def network(name="head.bias", value=0.0, hook=None):
    """A network, one number of it changed, or with a hook."""
    torch.manual_seed(0)
    model = CCT(TINY).eval()
    model.state_dict()[name].view(-1)[0] = value
    if hook:
        getattr(model.blocks[0], hook)(lambda *_: None)
    return model


def pictures(shape, dtype=torch.float32, value=0.5, layout=None):
    """Images of one value, or such as hold none."""
    if layout == "meta":
        return torch.empty(shape, device="meta")
    images = torch.full(shape, value).to(dtype)
    return images.to_sparse() if layout == "sparse" else images


NAN, INF = float("nan"), float("inf")
NUMBER = st.sampled_from([NAN, INF, -INF, 1e30, -1e12, 1e5, 0.25, 3.0])
SIDES = st.sampled_from([0, 1, 2, 8, 9])
MODELS = (
    st.builds(network, st.sampled_from(["head.bias", "head.weight", "position", "blocks.0.norm1.bias"]), NUMBER)
    | st.builds(network, hook=st.sampled_from(["register_forward_hook", "register_forward_pre_hook"]))
    | st.sampled_from([nn.Tanh(), nn.Linear(5, 2), nn.Linear, nn.Sequential(), {}, TINY])
)
IMAGES = (
    st.builds(pictures, st.tuples(st.integers(0, 3), st.sampled_from([1, 3]), SIDES, SIDES))
    | st.builds(pictures, st.lists(SIDES, max_size=5))
    | st.builds(pictures, st.just((2, 1, 8, 8)), value=NUMBER)
    | st.builds(pictures, st.just((1, 1, 8, 8)), st.sampled_from([torch.float16, torch.float64, torch.int64]))
    | st.builds(pictures, st.just((1, 1, 8, 8)), layout=st.sampled_from(["meta", "sparse"]))
    | st.just([[0.5]])
)
WORDS_OF = {  # where a good value is a rare word
    "protocol": st.sampled_from(["stock", "tuned", "magic"]),
    "provider": st.sampled_from(["TFP", "TTP", "HE"]),
    "reveal": st.sampled_from(["logits", "label", "all"]),
    "dealt": st.sampled_from(["along", "ahead", "never"]),
    "convention": st.sampled_from(["paper", "torch", "mac"]),
    "meet": st.sampled_from(["127.0.0.1:0", "127.0.0.1:99999", ":0", "a\nb:1", "nowhere", "::1:٣"]),
    "link": st.sampled_from(["LAN", *private.LINKS.values()]),
    "device": st.sampled_from(["cpu", "cuda", "meta", "tpu", "cpu:7"]),
    "shape": st.lists(st.integers(-1, 9) | st.sampled_from([1.0, None, "8", 10**9]), min_size=3, max_size=5)
    | st.just((1, 1, 8, 8)),
    "speed": st.just(private.Speed(1e-4, 1e-8, 1e-8, 1e-9, 1e-9)),
    "dataset": st.just(torch.zeros(2, 1, 8, 8)),
    "config": st.sampled_from([TINY, preset("vit_2"), CCTConfig, "cct_2_3x1", {}]),
    "fields": st.dictionaries(st.sampled_from(["width", "heads", "patch", "image", "depth"]), VALUES, max_size=2),
    "model": MODELS,
    "images": IMAGES,
}


def change_of(parameters):
    """One or two arguments, changed to anything."""
    pairs = [st.tuples(st.just(name), WORDS_OF.get(name, st.nothing()) | VALUES) for name in parameters]
    return st.lists(st.one_of(pairs), min_size=1, max_size=2).map(dict)


def sound_model(x):
    if not isinstance(x, nn.Module) or any(part._forward_hooks or part._forward_pre_hooks for part in x.modules()):
        return False
    return all(tensor.isfinite().all() and tensor.abs().max() <= LIMIT for tensor in x.state_dict().values())


def sound_images(x):
    if not isinstance(x, torch.Tensor) or x.is_sparse or x.is_meta or x.dtype not in (torch.float32, torch.float64):
        return False
    return x.shape[0] > 0 and x.shape[1:] == (1, 8, 8) and bool((x.abs() <= 1024).all())


def is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool)


def counts(most):
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= most


# What may be taken: all else must have been refused.
SOUND = {
    "model": sound_model,
    "images": sound_images,
    "timeout": lambda x: is_number(x) and 0 < x <= 2e6,
    "bits": lambda x: x is None or (counts(22)(x) and x >= 8),
    "batch": lambda x: x is None or counts(2**31)(x),
    "n": counts(10_000),
    "repeats": counts(2**31),
    "warmup": lambda x: x == 0 or counts(2**31)(x),
    "check": lambda x: isinstance(x, bool),
    "drift": lambda x: isinstance(x, bool),
    "device": lambda x: x in ("cpu", "cpu:7", "cuda"),
    "protocol": lambda x: x in ("stock", "tuned"),
    "provider": lambda x: x in ("TFP", "TTP"),
    "reveal": lambda x: x in ("logits", "label"),
    "dealt": lambda x: x in ("along", "ahead"),
    "convention": lambda x: x in ("paper", "torch"),
    "meet": lambda x: x in ("127.0.0.1:0",),
    "link": lambda x: x is None or isinstance(x, private.Link),
    "speed": lambda x: x is None or isinstance(x, private.Speed),
    "shape": lambda x: len(x) == 4 and counts(2**31)(x[0]) and tuple(x[1:]) == (1, 8, 8),
    "audit": lambda x: x is None or isinstance(x, str) and x,
    "folder": lambda x: x is None or isinstance(x, str) and x,
    "progress": lambda x: x is None or callable(x),
    "label": lambda x: isinstance(x, str),
    "rtt": lambda x: is_number(x) and 0 <= x < INF,
    "bandwidth": lambda x: is_number(x) and x > 0,
    "dataset": lambda x: isinstance(x, datasets.Data),
    "config": lambda x: isinstance(x, CCTConfig | ViTConfig),
    "fields": lambda x: isinstance(x, dict) and "depth" not in x,
}
# What a network costs hangs on no number in it.
CLEAR = {
    "model": lambda x: isinstance(x, nn.Module),
    "images": lambda x: x is None or (x.shape[0] > 0 and x.is_floating_point()),
}
GOOD = {
    "model": network(),
    "images": torch.zeros(1, 1, 8, 8),
    "shape": (1, 1, 8, 8),
    "dataset": datasets.load("digits"),
    "config": TINY,
    "fields": {},
    "rtt": 1e-3,
    "bandwidth": 1e6,
    "protocol": "tuned",
    "n": 4,
}
# How a line calls an argument, where not by its name.
NAMED = {
    "model": ("model", "weights", "network", "no private protocol", "FLOPs"),
    "fields": ("field", "width", "heads", "patch", "image"),
    "speed": ("speed", "seconds"),
    "batch": ("batch", "n is"),
}
CALLS = {
    "infer": private.infer,
    "evaluate": private.evaluate,
    "estimate": private.estimate,
    "Link": private.Link,
    "parameters": cost.parameters,
    "flops": cost.flops,
    "latency": cost.latency,
    "peak_memory": cost.peak_memory,
    "breakdown": cost.breakdown,
    "build": build,
    "config_of": config_of,
    "CCT": CCT,
    "ViT": ViT,
}


@pytest.mark.parametrize("name", CALLS)
@settings(SWEEP, max_examples=120)
@given(data=st.data())
def test_a_call_is_refused_in_one_line_or_begins(name, data, monkeypatch):
    call = CALLS[name]
    parameters = [each for each in inspect.signature(call).parameters if each != "attention"]
    changes = data.draw(change_of(parameters))
    arguments = {each: GOOD[each] for each in parameters if each in GOOD} | changes
    with monkeypatch.context() as patched:
        patched.setattr(launch, "guard", begins)  # the first that starts a process
        patched.setattr(cost, "_now", lambda images: 0.0)
        try:
            call(**arguments)
        except Began:
            pass
        except (ValueError, TypeError) as error:
            line = str(error)
            assert "\n" not in line and 20 < len(line) < 600, line
            assert any(word in line for each in changes for word in NAMED.get(each, (each,))), (line, changes)
            return
    sound = SOUND | (CLEAR if name not in ("infer", "evaluate") else {})
    assert all(sound[each](value) for each, value in changes.items()), changes


TAKEN = st.fixed_dictionaries(
    {
        "model": st.builds(network, st.sampled_from(["head.bias", "head.weight"]), st.sampled_from([-40.0, 0.25, 3.0])),
        "images": st.builds(pictures, st.tuples(st.integers(1, 3), st.just(1), st.just(8), st.just(8)))
        | st.builds(pictures, st.just((2, 1, 8, 8)), st.just(torch.float64), st.sampled_from([-5.0, 0.0, 3.0])),
        "timeout": st.sampled_from([100, 2e6]),
    },
    optional={
        "provider": st.sampled_from(["TFP", "TTP"]),
        "bits": st.integers(10, 16),
        "batch": st.sampled_from([1, 2, 2**31 - 1]),
        "check": st.booleans(),
        "drift": st.booleans(),
        "reveal": st.sampled_from(["logits", "label"]),
        "dealt": st.sampled_from(["along", "ahead"]),
        "link": st.just(private.Link(1e-5, INF)),
    },
)


@pytest.mark.processes
@settings(SWEEP, max_examples=6)
@given(arguments=TAKEN)
def test_what_is_taken_is_answered_rightly(arguments):
    result = private.infer(protocol="tuned", **arguments)
    with torch.no_grad():
        clear = arguments["model"](arguments["images"].float())
    two = clear.topk(2, 1).values
    sure = two[:, 0] - two[:, 1] > 0.1  # of its class fixed point leaves no doubt
    assert len(result.labels) == len(clear) and not result.violations
    assert torch.equal(result.labels[sure], clear.argmax(1)[sure])
    if arguments.get("reveal") != "label":
        assert (result.logits - clear).abs().max() < 0.05


# Command lines

NUMBERS = "-1 0 1 2.5 nan inf -inf 1e400 1e-400 99999999999999999999"
OTHERS = [
    "abc",
    "none",
    "True",
    "[1",
    "[1]",
    "{}",
    "digits",
    "self",
    "∞",
    "'",
    "",
    " ",
    "a b",
    "/proc/nothing",
    "-",
    "--",
]
WORDS = st.sampled_from([*NUMBERS.split(), *OTHERS])
PARTY = (
    "meet dealer identity peer architecture protocol provider bits batch link reveal device reserve fill audit drift "
    "timeout nonsense"
)
OPTIONS = {
    "train": "preset method data protocol image device root epochs batch lr optimizer weight-decay warmup augment clip "
    "label-smoothing distill-logits temperature keep sgd seed nonsense",
    "search": "preset method data image device granularity budget rule weight gate cheap score search-epochs epochs "
    "lr seed nonsense",
    "replace train": "run base-model weights data root device seed rep-by layers loss epochs batch-size lr "
    "weight-decay warmup-epochs block-ft-epochs block-ft-lr block-ft-batch-size head-epochs head-lr reprob drop-path "
    "normalizer augment skip-train-attn out nonsense",
    "replace prune": "run data root device out seed regulariser coefficient threshold share epochs batch-size lr "
    "finetune-epochs augment reprob nonsense",
    "replace downstream": "run data root device out seed epochs batch-size lr augment reprob drop-path head-only "
    "nonsense",
    "replace visualize": "run data root n block out nonsense",
    "study": "profile records only set timeout notebooks engine nonsense",
    "evidence": "profile most minutes engine nonsense",
    "infer": "run preset method data root n batch protocol provider reveal timeout out nonsense",
    "evaluate": "run preset method data root n batch protocol provider out nonsense",
    "quantize": "model weights run data data-path image test-before test-images out device bits-weights "
    "bits-activations activations per-channel same-ends regulariser migration shift log2 reconstruction images batch "
    "iterations lr iterations-activations lr-activations seed n_bits_w weight nonsense",
    "estimate": "preset row torchvision image softmax gelu protocol provider link batch reveal out nonsense",
    "calibrate": "again check nonsense",
    "migrate": "folder nonsense",
    "server": f"weights {PARTY}",
    "client": f"images result shape {PARTY}",
}
FIXED = {
    "train": ["--preset", "cct_2_3x1", "--data", "digits"],
    "search": ["--preset", "cct_2_3x1", "--data", "digits", "--budget", "1"],
    "replace train": ["--run", "."],
    "replace prune": ["--run", "."],
    "replace downstream": ["--run", ".", "--data", "digits"],
    "replace visualize": ["--run", "."],
    "infer": ["--preset", "cct_2_3x1", "--method", "SA L2Q"],
    "evaluate": ["--preset", "cct_2_3x1", "--method", "SA L2Q", "--data", "digits", "--n", "2"],
    "estimate": ["--preset", "cct_2_3x1", "--row", "SA L2Q"],
    "quantize": ["--model", "efficientvit_test", "--data", "digits", "--weights", "weights.pt"],
    "server": ["--meet", "127.0.0.1:1", "--architecture", "cct.json", "--weights", "weights.pt"],
    "client": ["--meet=127.0.0.1:1", "--architecture=cct.json", "--images=images.pt", "--result=result.pt"],
}


@pytest.mark.parametrize("command", OPTIONS)
@settings(SWEEP, max_examples=60)
@given(data=st.data())
def test_a_command_is_refused_in_one_line_or_begins(command, data, monkeypatch, capsys):
    work = {
        "train": ["salvit_core.training.__main__.train"],
        "search": ["salvit_core.search.sas.search", "salvit_core.search.released.search"],
        "replace train": ["salvit_core.replacement.__main__.distil"],
        "replace prune": ["salvit_core.replacement.__main__.prune"],
        "replace downstream": ["salvit_core.replacement.__main__.train_stage"],
        "replace visualize": ["salvit_core.models.maps.importance"],
        "study": ["salvit_core.experiments.study.execute"],
        "evidence": ["salvit_core.experiments.execute.collect"],
        "infer": ["salvit_core.private.parties.launch.guard"],  # the first that starts a process
        "evaluate": ["salvit_core.private.parties.launch.guard"],
        "estimate": ["salvit_core.private.estimation.network_of"],
        "calibrate": ["salvit_core.experiments.calibration.calibrate"],
        "quantize": ["salvit_core.quantization.__main__.quantize"],
        "migrate": ["salvit_core.experiments.migrate.migrate"],
        "server": ["salvit_core.private.parties.rendezvous.meet", "salvit_core.private.parties.gloo.meet"],
        "client": ["salvit_core.private.parties.rendezvous.meet", "salvit_core.private.parties.gloo.meet"],
    }
    options = st.dictionaries(st.sampled_from(OPTIONS[command].split()), WORDS, min_size=1, max_size=2)
    drawn = data.draw(options)
    words = [*FIXED.get(command, []), *(word for name, value in drawn.items() for word in (f"--{name}", value))]
    if command == "migrate":  # its folder stands by itself
        words = [*(["."] if "folder" not in drawn else []), *(word for word in words if word != "--folder")]
    party = command in ROLES
    capsys.readouterr()
    with monkeypatch.context() as patched, tempfile.TemporaryDirectory() as root:
        for name in work[command]:
            patched.setattr(name, begins)
        if command == "study":
            words += ["--notebooks", str(workspace.ROOT / "notebooks")] if "notebooks" not in drawn else []
        patched.setattr(workspace, "ROOT", Path(root))
        patched.chdir(root)
        if party:
            Path("cct.json").write_text(json.dumps(dataclasses.asdict(TINY)))
            torch.save(network().state_dict(), "weights.pt")
            torch.save(torch.zeros(1, 1, 8, 8), "images.pt")
        if command.startswith("replace"):  # what it starts from
            recurrent = command == "replace prune"
            config = dataclasses.replace(TINY, attention="multi_lstm" if recurrent else "self")
            Path("result.json").write_text(json.dumps({"config": dataclasses.asdict(config), "data": "digits"}))
            torch.save(build(config).state_dict(), "weights.pt")
        if command == "quantize":
            torch.save(build(preset("efficientvit_test")).state_dict(), "weights.pt")
        try:
            cli.main(["party", command, *words] if party else [*command.split(), *words])
        except Began:
            return
        except SystemExit as ended:
            line = capsys.readouterr().err.strip() if ended.code == 2 else str(ended.code)
            who = f"party {ROLES.index(command)} ({command}): " if party and ended.code != 2 else "error: "
            assert line.startswith(who)
            assert "\n" not in line, line
            blank = ("''", "' '", "cannot read", "cannot write")  # a path of nothing is seen in no line
            named = [word for value in drawn.values() for word in ((value,) if value.strip() else blank)]
            given_words = [*drawn, *named, *(["method"] if "row" in drawn else [])]
            assert any(word in line or word.replace("-", "_") in line for word in given_words), (line, drawn)
        else:
            assert command == "evidence" and drawn.get("most") == "0"  # which is nothing to do
        written = {path.name for path in Path(root).rglob("*") if path.is_file()}
        assert written <= {"cct.json", "weights.pt", "images.pt", "result.json"}, (written, drawn)


def test_the_commands_have_the_options_that_are_swept():
    kinds = {"study": study.Study, "evidence": evidence.Evidence, "calibrate": calibration.Command}
    here = {name: kind for name, (kind, _) in cli._HERE.items()}
    modes = {"replace visualize": cli.Visualize, "replace prune": replacement.Prune}
    modes |= {"replace train": replacement.Train, "replace downstream": replacement.Downstream}
    del here["replace"]  # its modes have the options
    for command, kind in {**kinds, **here, **modes}.items():
        names = {field.name.replace("_", "-") for field in dataclasses.fields(kind)} - {"list", "publish"}
        assert names == set(OPTIONS[command].split()) - {"nonsense"}
    assert set(cli.COMMANDS) == {command.split()[0] for command in OPTIONS} - {"server", "client"} | {"party"}

"""A sweep of generated values over configurations and command lines: right, or refused in one line that names them."""

import dataclasses
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salvit_core import PRESETS, build, cli, preset, workspace
from salvit_core.experiments import evidence, study
from salvit_core.experiments.profiles import Profile, profile
from salvit_core.models.config import CCTConfig, ViTConfig
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
OPTIONS = {
    "train": "preset method data protocol image device root epochs batch lr optimizer weight-decay warmup augment clip "
    "label-smoothing distill-logits temperature keep seed nonsense",
    "search": "preset method data image device granularity budget rule weight search-epochs epochs lr seed nonsense",
    "study": "profile records only set timeout notebooks nonsense",
    "evidence": "profile most minutes nonsense",
}
FIXED = {
    "train": ["--preset", "cct_2_3x1", "--data", "digits"],
    "search": ["--preset", "cct_2_3x1", "--data", "digits", "--budget", "1"],
}


class Began(Exception):
    """The work itself, which this does not do."""


@pytest.mark.parametrize("command", OPTIONS)
@settings(SWEEP, max_examples=60)
@given(data=st.data())
def test_a_command_is_refused_in_one_line_or_begins(command, data, monkeypatch, capsys):
    def begins(*arguments, **options):
        raise Began

    work = {
        "train": ["salvit_core.training.__main__.train"],
        "search": ["salvit_core.search.sas.search", "salvit_core.search.released.search"],
        "study": ["salvit_core.experiments.study.execute"],
        "evidence": ["salvit_core.experiments.execute.collect"],
    }
    options = st.dictionaries(st.sampled_from(OPTIONS[command].split()), WORDS, min_size=1, max_size=2)
    drawn = data.draw(options)
    words = [*FIXED.get(command, []), *(word for name, value in drawn.items() for word in (f"--{name}", value))]
    capsys.readouterr()
    with monkeypatch.context() as patched, tempfile.TemporaryDirectory() as root:
        for name in work[command]:
            patched.setattr(name, begins)
        if command == "study":
            words += ["--notebooks", str(workspace.ROOT / "notebooks")] if "notebooks" not in drawn else []
        patched.setattr(workspace, "ROOT", Path(root))
        try:
            cli.main([command, *words])
        except Began:
            return
        except SystemExit as ended:
            line = capsys.readouterr().err.strip() if ended.code == 2 else str(ended.code)
            assert line.startswith("error: ") and "\n" not in line, line
            given_words = [*drawn, *(value for value in drawn.values() if value.strip())]
            assert any(word in line or word.replace("-", "_") in line for word in given_words), (line, drawn)
        else:
            assert command == "evidence" and drawn.get("most") == "0"  # which is nothing to do


def test_the_commands_have_the_options_that_are_swept():
    for kind, command in ((study.Study, "study"), (evidence.Evidence, "evidence")):
        names = {field.name for field in dataclasses.fields(kind)} - {"list", "publish"}
        assert names == set(OPTIONS[command].split()) - {"nonsense"}

"""The check of fields: types, finiteness, ranges and names, said in one line."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pytest

from salvit_core.fields import Among, Checked, Count, Positive, Share


@dataclass(frozen=True)
class Part(Checked):
    share: Share = 0.5


@dataclass(frozen=True)
class Config(Checked):
    count: Count = 1
    rate: Positive = 0.1
    flag: bool = False
    kind: Annotated[str, Among("a", "b")] = "a"
    most: Count | None = None
    sizes: tuple[Count, ...] = (1,)
    part: Part | str = Part()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"count": 0}, "count is 0: give 1 or more"),
        ({"count": 2.0}, "count is 2.0: give a whole number"),
        ({"count": True}, "count is True: give a whole number"),
        ({"count": 2**40}, f"count is {2**40}: give at most {2**31 - 1}"),
        ({"rate": 0}, "rate is 0: give a positive number"),
        ({"rate": float("inf")}, "rate is inf: give a finite number"),
        ({"rate": 10**400}, ": give a finite number"),
        ({"rate": "0.1"}, "rate is '0.1': give a finite number"),
        ({"flag": "no"}, "flag is 'no': give True or False"),
        ({"flag": 1}, "flag is 1: give True or False"),
        ({"kind": "c"}, "kind 'c' is unknown: choose from a, b"),
        ({"kind": ["a"]}, r"kind is ['a']: give a name"),
        ({"most": 0}, "most is 0: give 1 or more, or None"),
        ({"sizes": 3}, "sizes is 3: give a tuple"),
        ({"sizes": (1, None)}, "sizes is (1, None): give a whole number"),
        ({"part": 3}, "part is 3: give a Part or str"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(wrong, said):
    with pytest.raises(ValueError) as refused:
        Config(**wrong)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_is_from_zero_to_less_than_one(share):
    with pytest.raises(ValueError, match="share is .*: give (0.0 to less than 1.0|a finite number)"):
        Part(share)


def test_what_is_right_stays_as_it_is():
    config = Config(np.int64(3), np.float32(0.5), True, "b", None, [2, 3], "whole")
    assert config == Config(3, 0.5, True, "b", None, (2, 3), "whole")
    assert (type(config.count), type(config.rate)) == (int, float)  # which JSON holds
    assert type(Config(rate=1).rate) is float


def test_a_long_value_is_cut():
    with pytest.raises(ValueError) as refused:
        Config(kind="x\n" * 500)
    assert len(str(refused.value)) < 150 and "\n" not in str(refused.value)

"""What a field of a configuration may be: its annotation says it, and every field is held to it when one is made.

@dataclass(frozen=True)
class Recipe:
    epochs: Count = 600
    lr: Positive = 6e-4
    optimizer: Annotated[str, Among("adamw", "adam")] = "adamw"

    __post_init__ = check
"""

import dataclasses
import functools
import math
import numbers
import types
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; of those that are whole where the field is."""

    least: float
    most: float = math.inf
    open: bool = False  # without `least` itself
    under: bool = False  # without `most` itself

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        low = self.least < value if self.open else self.least <= value
        return low and (value < self.most if self.under else value <= self.most)

    def expected(self, value: float) -> str:
        """What to give in place of a number that is not in the range."""
        if self.most < 1000:
            low = f"more than {self.least}" if self.open else f"{self.least}"
            return f"{low} to {'less than ' if self.under else ''}{self.most}"
        if value > self.most:
            return f"at most {self.most}"
        return "a positive number" if self.open and not self.least else f"{self.least} or more"


class Among(tuple):
    """The names that a field may have."""

    def __new__(cls, *names: str):
        """Of the names."""
        return super().__new__(cls, names)


# Sizes that no machine holds would fail late, in torch's words.
Size = Annotated[int, Range(1, 2**20)]
Count = Annotated[int, Range(1, 2**31 - 1)]
CountOrNone = Annotated[int, Range(0, 2**31 - 1)]  # zero: none, or all
Seed = Annotated[int, Range(0, 2**63 - 1)]
Positive = Annotated[float, Range(0, open=True)]
Weight = Annotated[float, Range(0.0)]  # of a term: zero leaves it out
Share = Annotated[float, Range(0.0, 1.0, under=True)]


def check(config: Any) -> None:
    """Refuse a dataclass with a field that its annotation does not allow: type, finiteness, range, name.

    A union of more than classes, and what a dict holds, is left to the class itself. Numbers become what the
    annotation says: 1 for a float is 1.0, and those of NumPy are Python's, which JSON holds.

    Raises:
        ValueError: names the field, its value and what is expected.
    """
    for name, kind in _kinds(type(config)).items():  # type: ignore[arg-type]  # a class can be hashed
        value = getattr(config, name)
        if isinstance(value, list) and (get_origin(kind) is tuple or tuple in get_args(kind)):  # JSON has lists
            object.__setattr__(config, name, value := tuple(value))
        if wanted := _wanted(value, kind):
            raise ValueError(f"{name} {wanted.format(value=shown(value))}")
        if whole(value) and float not in (kind, *get_args(kind)):
            object.__setattr__(config, name, int(value))
        elif number(value):
            object.__setattr__(config, name, float(value))


class Checked:
    """A dataclass whose fields are looked at when one is made."""

    def __post_init__(self):
        check(self)


def whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, which True and 2.0 are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number, which True and "2" are not; NaN is one."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value as an error's line shows it: on one line, and not for pages."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def _kinds(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _wanted(value: Any, kind: Any) -> str:
    """What is wrong, with {value} where the value goes; "" where nothing is."""
    base, *rules = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if get_origin(base) in (Union, types.UnionType):
        others = tuple(each for each in get_args(base) if each is not type(None))
        nothing = len(others) < len(get_args(base))
        if nothing and value is None:
            return ""
        if len(others) == 1:
            said = _wanted(value, others[0])
            return f"{said}, or None" if said and nothing else said
        if not all(isinstance(each, type) for each in others) or isinstance(value, others):
            return ""
        return f"is {{value}}: give a {' or '.join(each.__name__ for each in others)}"
    if get_origin(base) is tuple and get_args(base)[1:] == (...,):
        if not isinstance(value, tuple):
            return "is {value}: give a tuple"
        return next((said for each in value if (said := _wanted(each, get_args(base)[0]))), "")
    if base is int and not whole(value):
        return "is {value}: give a whole number"
    if base is float and not (number(value) and math.isfinite(_float(value))):
        return "is {value}: give a finite number"
    if isinstance(base, type) and base not in (int, float) and not isinstance(value, base):
        return f"is {{value}}: give {_NAMES.get(base, f'a {base.__name__}')}"
    for rule in rules:
        if isinstance(rule, Range) and not rule.holds(value):
            return f"is {{value}}: give {rule.expected(value)}"
        if isinstance(rule, Among) and value not in rule:
            return f"{{value}} is unknown: choose from {', '.join(rule)}"
    return ""


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return math.inf


_NAMES = {bool: "True or False", str: "a name", dict: "a dict"}

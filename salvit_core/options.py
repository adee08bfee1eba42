"""A command line as the fields of a dataclass; what is wrong with it is said in one line, where tyro draws a box."""

import contextlib
import io
import os
import sys
from typing import TypeVar

import tyro

Options = TypeVar("Options")


def parsed(kind: type[Options], program: str, words: list[str] | None = None) -> Options:
    """A command's options.

    Args:
        kind: a dataclass; its docstring and those of its fields are the help.
        program: what the command is called.
        words: the command line after its name; sys.argv's where None.

    Raises:
        SystemExit: help was asked for (status 0), or an option is wrong (status 2, the line on standard error).
    """
    said, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "20000" if _asks_no_help(words) else width or "120"  # a box that wraps cuts the line
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=words, prog=program)
    except SystemExit as ended:
        if ended.code in (None, 0):
            raise
        # Around the title and the problem stands a box, of dashes where the terminal has no other letters.
        lines = [line.strip("│╭╮╰╯─ ") for line in said.getvalue().splitlines()]
        _, problem, *_ = [*(line for line in lines if line.strip("-")), *["options cannot be read"] * 2]
        if blank := [word for word in (sys.argv[1:] if words is None else words) if not word.strip()]:
            problem += f" (one is {blank[0]!r})"  # which is seen in no line
        print(f"error: {problem}: {program} --help tells the options", file=sys.stderr)
        sys.exit(2)
    finally:
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width


def _asks_no_help(words: list[str] | None) -> bool:
    return not {"-h", "--help"} & set(sys.argv[1:] if words is None else words)

"""Dataclasses as options of commands: one home for name, help and default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from data_prep.options import FieldsOf, Only, Read, spread


def numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


@dataclass(frozen=True)
class Inner:
    steps: Annotated[int, typer.Option(min=0, help="how many")] = 0
    kind: Annotated[Literal["a", "b"], typer.Option()] = "a"
    hidden: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("a", "b"):
            raise ValueError(f"--kind {self.kind}: must be a or b")


@dataclass(frozen=True)
class Outer:
    name: Annotated[str, typer.Option("--called")]
    inner: Inner = Inner(steps=7, hidden=2.0)
    columns: Annotated[tuple[str, ...], typer.Option("--obs")] = ()
    numbers: Annotated[tuple[float, ...], typer.Option(), Read(numbers)] = (1.0, 2.0)
    rest: Annotated[int, typer.Option()] = 3


class Model(BaseModel):
    genes: int = Field(default=5, description="genes in all")


@spread
def command(
    outer: Annotated[Outer, Only("name", "inner", "columns", "numbers")],
    model: Annotated[dict[str, Any], FieldsOf(Model, "genes")],
    flag: Annotated[bool, typer.Option("--flag")] = False,
) -> None:
    """Say what was given."""
    print((outer, model, flag))


def said(*words: str) -> str:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_defaults_are_those_of_the_dataclass_that_stands_there():
    assert said("--called", "x") == f"{(Outer('x'), {'genes': 5}, False)}\n"


def test_what_is_given_becomes_fields():
    words = ("--called=x", "--steps=2", "--kind=b", "--obs=p", "--obs=q", "--numbers=4,6")
    inner = Inner(2, "b", hidden=2.0)
    expected = (Outer("x", inner, ("p", "q"), (4.0, 6.0)), {"genes": 9}, True)
    assert said(*words, "--genes=9", "--flag") == f"{expected}\n"


def test_help_and_refusals():
    shown = said("--help")
    assert "how many" in shown and "genes in all" in shown and "1.0,2.0" in shown
    assert "--hidden" not in shown and "--rest" not in shown
    with pytest.raises(ValueError, match="--kind c: must be a or b"):
        said("--called=x", "--kind=c")


def test_two_options_of_one_name_are_refused():
    def twice(inner: Inner, steps: int = 1) -> None:
        """Never made."""

    with pytest.raises(AssertionError, match="two options are called {'steps'}"):
        spread(twice)

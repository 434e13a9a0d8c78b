"""Dataclasses as options of commands: a setting is named, explained and given a default once.

A field is an option where its type is ``Annotated[..., typer.Option(...)]`` (or ``Argument``). A
command that is decorated with `spread` takes the dataclass; typer sees the fields.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

Memory = Annotated[
    float,
    typer.Option(
        "--memory",
        help="GiB of cells that each process may hold, beside 0.5 for the program itself",
    ),
]
Processes = Annotated[
    int, typer.Option(help="processes on this machine; or start with mpirun -n N")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
GeneTable = Annotated[
    Path | None, typer.Option(help="table of genes with biotypes (csv, tsv, parquet)")
]
GeneMapping = Annotated[
    list[Path] | None,
    typer.Option(help="other id or symbol -> gene id (json, pkl); adds to those of --vocab"),
]
MinCells = Annotated[
    int, typer.Option("--min-cells", help="fewest cells of a gene in a built vocabulary")
]
MaxLength = Annotated[int | None, typer.Option(help="tokens; default 2048, V2 4096")]


class Only:
    """Which fields of a dataclass are options of a command: ``Annotated[Settings, Only("a")]``.

    The others keep their defaults.
    """

    def __init__(self, *names: str) -> None:
        self.names = names


class FieldsOf:
    """Fields of a pydantic model, as a dictionary: ``Annotated[dict, FieldsOf(Settings, "a")]``.

    Their descriptions are the help. The model itself is made, and checked, by the command.
    """

    def __init__(self, model: Any, *names: str) -> None:
        self.model, self.names = model, names


@dataclasses.dataclass(frozen=True)
class Read:
    """Beside an option: its value is made of what the command line gives.

    Attributes
    ----------
    make
        Makes the value; a ValueError is the user's message.
    given
        What typer is to take, such as one text, or many.
    """

    make: Callable[[Any], Any]
    given: Any = str


_EMPTY = inspect.Parameter.empty


class _Group:
    """The options that the parameters of a command, or the fields of a dataclass, stand for."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.parameters: dict[str, inspect.Parameter] = {}
        self._readers: dict[str, Callable[[Any], Any]] = {}
        self._inner: dict[str, _Group] = {}

    def add(self, name: str, hint: Any, default: Any) -> None:
        """Add a parameter or field."""
        kind, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        inner = _group_of(kind, more, default)
        twice = self.parameters.keys() & (inner.parameters if inner else {name: None})
        assert not twice, f"two options are called {twice}"
        if inner:
            self._inner[name] = inner
            self.parameters |= inner.parameters
            return
        if get_origin(kind) is Literal:
            kind = str  # the dataclass refuses other words, in one line as all our messages
        read = next((m for m in more if isinstance(m, Read)), None)
        if read is None and get_origin(kind) is tuple:
            read = Read(tuple, list[get_args(kind)[0]] | None)
        if read is not None:
            self._readers[name], kind = read.make, read.given
            if isinstance(default, (tuple, dict)):  # as it would be written on the command line
                default = ",".join(map(str, default)) if kind is str else None
        info = [m for m in more if isinstance(m, ParameterInfo)]
        self.parameters[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default,
            annotation=Annotated[kind, *info] if info else kind,
        )  # fmt: skip

    def build(self, given: dict[str, Any]) -> Any:
        """Return what is made of the values of this group's options."""
        values = {name: inner.build(given) for name, inner in self._inner.items()}
        taken = {name for inner in self._inner.values() for name in inner.parameters}
        for name in self.parameters.keys() & given.keys() - taken:
            value, read = given[name], self._readers.get(name)
            if read is None:
                values[name] = value
            elif value is not None and value != []:
                values[name] = read(value)
        return self.make(**values)


def _group_of(kind: Any, more: list[Any], default: Any) -> _Group | None:
    """Return the options of a parameter or field, if there are several of them."""
    if model := next((m for m in more if isinstance(m, FieldsOf)), None):
        group = _Group(dict)
        for name in model.names:
            field = model.model.model_fields[name]
            option = Annotated[field.annotation, typer.Option(help=field.description)]
            group.add(name, option, field.default)
        return group
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return None
    made = isinstance(default, kind)
    group = _Group(functools.partial(dataclasses.replace, default) if made else kind)
    only = next((m.names for m in more if isinstance(m, Only)), None)
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name) if made else _default_of(field)
        marks = get_args(hints[field.name])[1:]
        is_option = any(isinstance(m, ParameterInfo) for m in marks)
        is_option |= dataclasses.is_dataclass(hints[field.name])
        if is_option and (only is None or field.name in only):
            group.add(field.name, hints[field.name], value)
    return group


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return _EMPTY if field.default is dataclasses.MISSING else field.default


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command in which the fields of dataclasses are options of their own.

    A default of an option is that of its field, or of the dataclass that is the default of the
    parameter or field in which it stands.
    """
    group = _Group(function)
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        group.add(parameter.name, hints[parameter.name], parameter.default)

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        return group.build(given)

    parameters = list(group.parameters.values())
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    del command.__wrapped__  # type: ignore[attr-defined]
    return command

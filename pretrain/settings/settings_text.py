"""Settings as text: parse an override of the command line, and explain wrong settings."""

from __future__ import annotations

import difflib
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from pretrain.settings.architecture import number_if_one


def apply_override(content: dict, override: str) -> None:
    """Apply ``section.field=value`` to settings; raise ValueError if it does not have that form."""
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or len(parts) != 2:
        raise ValueError(f"{override!r}: settings are given as section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not readable as YAML") from error
    section = content.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ValueError(f"{override!r}: '{parts[0]}' is no section")
    section[parts[1]] = number_if_one(value)


def explain(error: Any, settings: type[BaseModel]) -> str:
    """Return a description of a validation problem, with the nearest name if one is misspelt.

    `settings` is the model of all sections that was validated.
    """
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_names(error["loc"][:-1], settings)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {sorted(known)}"
        return f"'{location}' is no setting; {hint}"
    if error["type"] == "missing":
        return f"'{location}' is required (give {location}=...)"
    if not location:  # it concerns several sections, which the text names
        return error["msg"]
    return f"'{location}': {error['msg']} (given {error['input']!r})"


def _known_names(location: tuple, model: type[BaseModel]) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation
        if get_origin(annotation) is not None:
            annotation = next(a for a in get_args(annotation) if isinstance(a, type))
        assert isinstance(annotation, type)
        model = annotation
    return list(model.model_fields)

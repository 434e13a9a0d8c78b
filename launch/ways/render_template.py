"""The texts of queues and clusters, from jinja2 templates in which every value is quoted.

A template that an administrator wrote is a text to fill in, not a program: it runs in jinja2's
sandbox, reads no other file, and what is wrong with it is one line that names it.
"""

from __future__ import annotations

import json
import re
import shlex
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

FOLDER = Path(__file__).parent / "templates"
BATCH_FILE, MANIFEST = FOLDER / "slurm.sbatch", FOLDER / "kubernetes.yaml"
TEMPLATE_HELP = "of your own, instead of the one in launch/ways/templates: docs/clusters.md"


def render_bash(template: Path, variables: Mapping[str, Any]) -> str:
    """Return a script for bash: each value a word for the shell, a list as many words.

    Raises
    ------
    ValueError
        The template cannot be read or filled in, or does not begin with ``#!``.
    """
    filters = {"line": _line, "sbatch": for_sbatch}
    text = _filled_in(template, variables, _words, filters)
    if not text.startswith("#!"):
        raise ValueError(f"template {template}: must give a file that begins with #!/bin/bash")
    return text


def render_yaml(template: Path, variables: Mapping[str, Any]) -> str:
    """Return a template's documents, each value as JSON in it, written anew in one style.

    Raises
    ------
    ValueError
        The template cannot be read or filled in, or does not give objects of Kubernetes.
    """
    text = _filled_in(template, variables, _json, {})
    try:
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"template {template}: does not give YAML: {reason}") from None
    if not documents or not all(isinstance(d, dict) and "kind" in d for d in documents):
        raise ValueError(f"template {template}: must give objects of Kubernetes, with a kind")
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=100)


def _filled_in(
    template: Path,
    variables: Mapping[str, Any],
    quoted: Callable[[Any], Markup],
    filters: Mapping[str, Callable[[Any], Markup]],
) -> str:
    def written(value: Any) -> Any:
        if isinstance(value, jinja2.Undefined):
            str(value)  # raises, and names it
        if value is None:
            raise jinja2.TemplateRuntimeError("a value is written that was not given; ask with if")
        # A macro's text, or what a filter has quoted already.
        return value if isinstance(value, Markup) else quoted(value)

    # jinja2 marks what is quoted as it marks HTML that is; nothing of it is escaped as HTML here.
    environment = ImmutableSandboxedEnvironment(
        autoescape=True, finalize=written, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(filters)
    try:
        return environment.from_string(template.read_text(encoding="utf-8")).render(variables)
    except jinja2.UndefinedError as error:
        problem = f"{_line_of(error)}{error.message}; there are {', '.join(sorted(variables))}"
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {error.message}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        problem = "is no text in UTF-8"
    # What an expression in it may raise.
    except (
        jinja2.TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        problem = f"{_line_of(error)}{error}"
    raise ValueError(f"template {template}: {problem}")


def _line_of(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f"line {lines[-1]}: " if lines else ""


def _words(value: Any) -> Markup:
    return Markup(
        shlex.join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))
    )


def _line(value: Any) -> Markup:
    """Return a text as it is, on one line: for comments and options of sbatch."""
    return Markup(str(value).replace("\n", " "))


def for_sbatch(value: Any) -> Markup:
    """Return a value as sbatch reads it on a line with #SBATCH, where no shell does."""
    if "\n" in str(value):
        raise ValueError(f"{value!r}: sbatch reads no name with a line break")
    return Markup('"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"')


def _json(value: Any) -> Markup:
    text = json.dumps(value, ensure_ascii=False)
    # What YAML takes for a line break, or refuses; all escapes of JSON are YAML's too.
    return Markup(re.sub(r"[^\x20-\x7e]", lambda found: f"\\U{ord(found[0]):08x}", text))


class _Dumper(yaml.SafeDumper):
    """Writes every use of a value in full: a reader of a manifest follows no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

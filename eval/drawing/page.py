"""Pages of HTML, from jinja2 templates in which every value is escaped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2


def page_template(path: Path, **filters: Callable[..., str]) -> jinja2.Template:
    """Return a template to be rendered; a name that is not given to it then is an error."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= filters
    return environment.from_string(path.read_text())

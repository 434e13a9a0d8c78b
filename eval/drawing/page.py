"""Pages of HTML, from jinja2 templates in which every value is escaped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2


def page_template(path: Path, **filters: Callable[..., str]) -> jinja2.Template:
    """Return a template to be rendered; a name that is not given to it then is an error.

    It can include the files beside this module, such as ``style.html``.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )  # fmt: skip
    environment.filters |= filters
    return environment.from_string(path.read_text())

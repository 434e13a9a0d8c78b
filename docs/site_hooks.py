"""What mkdocs calls while it builds the site: generated pages, links out of `docs/`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # mkdocs loads this file by its path

from mkdocs.structure.files import File, Files  # noqa: E402

from docs.generate import commands_page, configuration_page, plans_table  # noqa: E402

# Files of the repository that are pages of the site too.
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "deepspeed_configs/README.md": "deepspeed.md",
}
_PLANS = "<!-- made: plans -->"
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", flags=re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not files of `docs/`."""
    made = {"commands.md": commands_page(), "configuration.md": configuration_page()}
    for source, page in PAGES.items():
        folder = source.rpartition("/")[0]
        made[page] = with_site_links((ROOT / source).read_text(), folder)
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{notebook.stem}.md"] = notebook_page(json.loads(notebook.read_text()))
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to the rest of the repository into links of the site, or into plain text."""
    if page.file.generated_by is not None:
        return markdown
    markdown = with_site_links(markdown, "docs")
    return markdown.replace(_PLANS, plans_table()) if _PLANS in markdown else markdown


def with_site_links(text: str, folder: str) -> str:
    """Return a page with links that hold on the site.

    Parameters
    ----------
    folder
        That the page lies in, seen from the root: ``""`` or ``"docs"``.
    """

    def replaced(found: re.Match[str]) -> str:
        shown, target = found[1], found[2]
        if "://" in target or target.startswith("#"):
            return found[0]
        path, mark, anchor = target.partition("#")
        inside = str((ROOT / folder / path).resolve().relative_to(ROOT))
        if inside in PAGES:
            return f"[{shown}]({PAGES[inside]}{mark}{anchor})"
        if inside.startswith("docs/") and inside.endswith((".md", ".svg", ".json")):
            return f"[{shown}]({inside.removeprefix('docs/')}{mark}{anchor})"
        if inside.endswith(".ipynb"):
            return f"[{shown}]({inside.removeprefix('docs/').replace('.ipynb', '.md')})"
        return shown  # a file of the code: the site does not hold it

    pieces, last = [], 0
    for fence in _FENCE.finditer(text):
        pieces += [_LINK.sub(replaced, text[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*pieces, _LINK.sub(replaced, text[last:])])


def notebook_page(notebook: dict[str, Any]) -> str:
    """Return an executed notebook as Markdown with its outputs."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [shown for o in cell.get("outputs", []) if (shown := _output(o))]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img src="data:image/png;base64,{"".join(data["image/png"]).strip()}" alt="">'
    if "text/html" in data:
        html = "".join(data["text/html"])
        # Without the notebook's own style, and in a box that scrolls on a phone.
        html = re.sub(r"<style.*?</style>", "", html, flags=re.S)
        return f'<div style="overflow-x: auto">{" ".join(html.split())}</div>'
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""

"""A page in a real browser, without a window: does it fit into so many pixels?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
NO_CHROMIUM = "no chromium on the path: `apt-get install chromium` to look at pages"
# Of a desk and of a phone.
WIDTHS = (1280, 390)
# Tells the page around it how wide it is, and what could not be drawn.
_SCRIPT = """<script>addEventListener("load", () => parent.postMessage({
  window: innerWidth, page: document.documentElement.scrollWidth,
  broken: [...document.images].filter(i => !i.naturalWidth).length}, "*"))</script>"""
# A window cannot be as narrow as a phone; a frame can.
_FRAME = """<!doctype html><body style="margin: 0"><script>
addEventListener("message", ({data}) => {
  for (const key in data) document.body.setAttribute("data-" + key, data[key]) })
</script><iframe src="%s" style="border: 0; width: %dpx; height: 900px"></iframe>"""


def look(page: Path, width: int, folder: Path) -> dict[str, int]:
    """Return widths of window and page in pixels, and how many images could not be drawn.

    A copy with a script is opened, in a profile in `folder`.
    """
    assert CHROMIUM, NO_CHROMIUM
    copy, frame = folder / f"{page.stem}-copy.html", folder / f"{page.stem}-frame.html"
    copy.write_text(page.read_text() + _SCRIPT)
    frame.write_text(_FRAME % (copy.name, width))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-extensions", "--no-first-run", f"--user-data-dir={folder / 'profile'}",
            "--window-size=1300,1000", "--virtual-time-budget=5000", "--dump-dom",
            frame.resolve().as_uri(),
        ],
        capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    found = {k: re.search(rf'data-{k}="(\d+)"', done.stdout) for k in ("window", "page", "broken")}
    assert all(found.values()), f"{page}: {done.stdout[:200]} {done.stderr[-800:]}"
    return {key: int(match[1]) for key, match in found.items() if match}

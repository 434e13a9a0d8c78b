"""Sections of the Markdown pages, for tests that compare them with code and recorded runs."""

from __future__ import annotations

import re


def slug(heading: str) -> str:
    """Return the name that GitHub gives a heading in links."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def section(page: str, anchor: str, begins: bool = False) -> str:
    """Return what stands under a heading, its subsections included.

    Parameters
    ----------
    anchor
        The heading's `slug`; `begins`: what it begins with.
    """
    # In code a line may begin with # too.
    headings = list(re.finditer(r"^(#+) (.+)$", re.sub(r"(?ms)^```.*?^```", _blank, page), re.M))
    slugs = [slug(h[2]) for h in headings]
    known = [s for s in slugs if s == anchor or (begins and s.startswith(anchor))]
    assert known, f"no section {anchor}"
    place = slugs.index(known[0])
    after = (h for h in headings[place + 1 :] if len(h[1]) <= len(headings[place][1]))
    return page[headings[place].end() : next((h.start() for h in after), len(page))]


def _blank(found: re.Match[str]) -> str:
    return " " * len(found[0])

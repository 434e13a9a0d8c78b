"""Which parameters of a test are asked for, so that a shared fixture prepares no others."""

from __future__ import annotations

from typing import Any

import pytest


def selected(request: pytest.FixtureRequest, test: str) -> list[dict[str, Any]]:
    """Return the parameters, name -> value, of each case of a test that this session runs."""
    return [
        item.callspec.params  # type: ignore[attr-defined]
        for item in request.session.items
        if getattr(item, "originalname", None) == test and item.path == request.path
    ]

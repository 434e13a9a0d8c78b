"""``geneloom launch``: the ways to start ranks."""

from __future__ import annotations

import typer

from launch.local import launch_local
from launch.mpi import launch_mpi

app = typer.Typer(help="Start a verb on several ranks.", no_args_is_help=True)
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("local", context_settings=_PASSED_ON)(launch_local)
app.command("mpi", context_settings=_PASSED_ON)(launch_mpi)

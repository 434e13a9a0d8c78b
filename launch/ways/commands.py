"""``geneloom launch``: the ways to start ranks."""

from __future__ import annotations

import typer

from launch.ways.hostfile import launch_hostfile
from launch.ways.kubernetes import launch_kubernetes
from launch.ways.local import launch_local
from launch.ways.mpi import launch_mpi
from launch.ways.slurm import launch_slurm

app = typer.Typer(help="Start a verb on several ranks.", no_args_is_help=True)
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("local", context_settings=_PASSED_ON)(launch_local)
app.command("hostfile", context_settings=_PASSED_ON)(launch_hostfile)
app.command("mpi", context_settings=_PASSED_ON)(launch_mpi)
app.command("slurm", context_settings=_PASSED_ON)(launch_slurm)
app.command("kubernetes", context_settings=_PASSED_ON)(launch_kubernetes)

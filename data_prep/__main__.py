"""Runs ``geneloom prepare`` under a launcher, as in ``mpirun -n 4 python -m data_prep ...``."""

import signal

import typer

from data_prep.errors import run_app
from data_prep.running.launchers import stop_with_launcher

if __name__ == "__main__":
    # Finished work is kept, so SIGUSR1 just ends the process; the same command continues later.
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    stop_with_launcher()
    from data_prep.cli import prepare_command

    app = typer.Typer(add_completion=False)
    app.command()(prepare_command)
    run_app(app)

"""What a launcher starts: ``mpirun -n 4 python -m data_prep ...``, as ``geneloom prepare``."""

import signal

import typer

from data_prep.errors import run_app
from data_prep.running.launchers import stop_with_launcher

if __name__ == "__main__":
    # What is done stays: a request to stop ends the process, and the same command goes on.
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    stop_with_launcher()
    from data_prep.cli import prepare_command

    app = typer.Typer(add_completion=False)
    app.command()(prepare_command)
    run_app(app)

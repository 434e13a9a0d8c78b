"""What a launcher starts on each rank: ``geneloom launch local --ranks 2 perturb ...``."""

import signal

import typer

from data_prep.errors import run_app
from data_prep.running.launchers import stop_with_launcher

_TIMEOUT_S = 24 * 3600  # how long ranks wait for one whose cells are longer


def main() -> None:
    """Join the ranks, then do as ``geneloom perturb``."""
    from eval.perturb.cli import perturb_command
    from pretrain.ranks import dist

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.callback(invoke_without_command=False)
    def _join(context: typer.Context) -> None:
        context.obj = dist.start(_TIMEOUT_S, threads=None)
        context.call_on_close(dist.leave)

    app.command("run")(perturb_command)
    run_app(app)


if __name__ == "__main__":
    import sys

    # A group has the callback that joins the ranks; this verb has no commands of its own.
    sys.argv.insert(1, "run")
    # There is nothing to save in between: a request to stop ends the rank.
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    stop_with_launcher()
    main()

"""Entry point for launchers on each rank: ``geneloom launch local --ranks 2 finetune cells``."""

import signal

import typer

from data_prep.errors import run_app
from data_prep.running.launchers import stop_with_launcher

_TIMEOUT_S = 1800  # ranks wait so long for a rank that still scores baselines


def main() -> None:
    """Join the process group, then run the command as ``geneloom finetune`` does."""
    from eval.cli import finetune_app
    from pretrain.ranks import dist

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def _join(context: typer.Context) -> None:
        context.obj = dist.start(_TIMEOUT_S, threads=None)
        context.call_on_close(dist.leave)

    for command in finetune_app.registered_commands:
        app.command(command.name)(command.callback)  # pyright: ignore[reportArgumentType]
    run_app(app)


if __name__ == "__main__":
    # There is nothing to save between epochs, so a request to stop ends the rank.
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    stop_with_launcher()
    main()

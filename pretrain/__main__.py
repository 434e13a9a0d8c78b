"""Entry point for launchers: ``deepspeed --module pretrain ...`` is ``geneloom pretrain ...``."""

import signal

from data_prep.running.launchers import stop_with_launcher

if __name__ == "__main__":
    # The launcher repeats the signal until the run listens; by default it would end a rank that is
    # still starting.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    stop_with_launcher()
    from pretrain.cli import main

    main()

"""What a launcher starts: ``deepspeed --module pretrain --config FILE ...``, the same as
``geneloom pretrain``."""

import signal

from data_prep.running.launchers import stop_with_launcher

if __name__ == "__main__":
    # The launcher asks again until the run listens; the default would end a rank that is starting.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    stop_with_launcher()
    from pretrain.cli import main

    main()

"""What a launcher starts: ``deepspeed --module pretrain --config FILE ...``, the same as
``geneloom pretrain``."""

from pretrain.cli import main

if __name__ == "__main__":
    main()

"""``python -m recclr`` is the command line, as torchrun starts it."""

from recclr.cli import main

if __name__ == "__main__":
    main()

"""``python -m bnfix`` is the command ``bnfix``."""

from bnfix.cli import main

if __name__ == "__main__":
    main()

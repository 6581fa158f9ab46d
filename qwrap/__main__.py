"""``python -m qwrap``: the shell."""

from qwrap.cli import main

if __name__ == "__main__":
    main()

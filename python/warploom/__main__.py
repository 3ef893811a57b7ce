"""``python -m warploom``: the ``warploom`` command."""

from warploom.cli import main

if __name__ == "__main__":
    main()

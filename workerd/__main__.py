"""`python -m workerd`, and the console script: the command `workerd`."""

import sys

from workerd import early


def main() -> None:
    """Run the command; always ends by SystemExit."""
    if "run" in sys.argv:  # it may be another word of another command, which then says so
        early.note()
    from workerd import cli  # what takes long comes after it

    cli.main()


if __name__ == "__main__":
    main()

"""`python -m workerd` is the command `workerd`."""

from workerd.cli import main

if __name__ == "__main__":
    main()

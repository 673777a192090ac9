"""`python -m muroan.cli`: the command under its module's own name, from which a launcher's processes import it."""

from muroan.cli import main

if __name__ == "__main__":
    main()

"""`python -m tilt`: the command, where its script is not on the path."""

from tilt.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

"""Run the command line as `python -m videoar`."""

from videoar.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

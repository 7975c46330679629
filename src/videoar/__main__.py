"""Run the command line as `python -m videoar`."""

from videoar.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

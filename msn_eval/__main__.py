"""`python -m msn_eval` is `msn-eval`."""

from msn_eval.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

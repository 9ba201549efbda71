"""`python -m msn_pretrain` is `msn-pretrain`."""

from msn_pretrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

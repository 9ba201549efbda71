"""One verb of `msn-eval` a module: its options and what it does."""

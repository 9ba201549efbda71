"""Networks of other packages, as factories for `--checkpoint py:examples.encoders.MODULE:FACTORY`."""

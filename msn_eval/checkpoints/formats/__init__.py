"""File formats of checkpoints, read without running code from the file."""

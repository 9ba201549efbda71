"""The training loop, its snapshots and its journal."""

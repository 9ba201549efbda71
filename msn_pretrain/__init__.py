"""Pre-training of the checkpoints that msn_eval measures."""

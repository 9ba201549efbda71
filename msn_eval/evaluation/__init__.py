"""The evaluation pipeline: checkpoint, encoder, features, probe, record."""

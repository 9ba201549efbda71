"""Ranks of a pre-training run and their collectives."""

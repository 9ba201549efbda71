"""Exact nearest-neighbour search by cosine similarity."""

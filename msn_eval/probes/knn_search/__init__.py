"""Exact nearest neighbours by cosine."""

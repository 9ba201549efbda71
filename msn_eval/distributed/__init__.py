"""Ranks: what one process of a job knows of the others, and how it learns that one is gone."""

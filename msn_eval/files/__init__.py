"""Reading and writing files: atomic writes, JSON records, package data."""

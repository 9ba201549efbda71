"""Features of frozen encoders: taps, extraction and cache."""

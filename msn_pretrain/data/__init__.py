"""Training images: sampling order and augmented views."""

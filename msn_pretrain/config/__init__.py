"""Pre-training recipes and their schedules."""

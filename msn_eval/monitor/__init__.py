"""Monitoring of a running pre-training: scores and alarms for each snapshot."""

"""Options and YAML files as typed dataclasses."""

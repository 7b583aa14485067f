"""Placeholder until the run directory's own module is merged."""

from formats.checkpoint import find_checkpoint, load_model  # noqa: F401

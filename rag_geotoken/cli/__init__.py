"""These are the commands that people type."""

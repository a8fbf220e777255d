"""The road from photos to predictions, and who walks it."""

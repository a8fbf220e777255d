"""This room is the road from photos to predictions, and who walks it."""

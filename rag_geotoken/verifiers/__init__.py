"""Verifiers: each gives every place of a pool a score."""

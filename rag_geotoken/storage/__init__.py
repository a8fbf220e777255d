"""This package keeps files, Parquet tables, weights, model folders and recipes, and shares work between threads."""

"""This package holds the road, the stages from photos to predictions, and the functions that run them."""

"""The token model, its decoding, and what it believes of a photo."""

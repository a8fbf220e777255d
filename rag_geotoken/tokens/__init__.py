"""This room holds the token model, its decoding, and the posterior that it gives a photo."""

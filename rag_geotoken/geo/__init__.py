"""The Earth: distances on the sphere, S2 cells, and the names of places."""

"""These modules compute distances on the Earth, S2 cells and the names of places."""

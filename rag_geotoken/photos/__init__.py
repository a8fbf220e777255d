"""Photos: the sources they come from, their pictures, and how two pictures are compared."""

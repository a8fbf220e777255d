"""Other systems and their weights: GeoCLIP, G3, GeoToken, SatCLIP."""

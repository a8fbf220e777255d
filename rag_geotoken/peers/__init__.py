"""These modules run other systems, or read their weights: GeoCLIP, G3, GeoToken, open_clip."""

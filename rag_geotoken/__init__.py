"""Retrieval-augmented image geolocalization."""

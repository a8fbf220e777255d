"""This package builds, searches and describes the index of a gallery."""

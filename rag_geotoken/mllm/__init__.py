"""Multimodal models asked about photos: one protocol, three clients, a journal of every answer."""

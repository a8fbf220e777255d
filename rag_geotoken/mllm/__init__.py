"""Multimodal models as verifiers: what they are asked, who asks them, and what their answers mean."""

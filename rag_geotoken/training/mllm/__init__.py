"""Training of the embedded multimodal verifier, and what the verdicts of any model are worth."""

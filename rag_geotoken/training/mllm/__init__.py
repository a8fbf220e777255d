"""This package trains the embedded multimodal verifier and tunes how much any model's verdicts count."""

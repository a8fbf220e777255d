"""These modules take a pool of places to one answer: strategies, confidence and their tuning."""

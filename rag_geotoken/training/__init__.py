"""These modules train the models, each one of them."""

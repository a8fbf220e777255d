"""This room keeps things: files, Parquet tables, weights, folders of models, recipes."""

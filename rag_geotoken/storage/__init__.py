"""How things are kept: files, Parquet tables, weights, folders of models, recipes; and how long work is done."""

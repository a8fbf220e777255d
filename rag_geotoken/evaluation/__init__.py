"""This package measures how good a run is: metrics, files of predictions, maps and the report."""

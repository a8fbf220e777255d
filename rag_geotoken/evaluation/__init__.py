"""How good a run is: metrics, files of predictions, maps and the report."""

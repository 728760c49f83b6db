"""The report on a run: held-out metrics, plots and one HTML page."""

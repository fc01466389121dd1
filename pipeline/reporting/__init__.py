"""The report: what is read from runs, charts, thumbnails, the map of features."""

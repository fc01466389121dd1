"""The application: extract features, train heads on them, fine-tune. ``python -m pipeline --help``."""

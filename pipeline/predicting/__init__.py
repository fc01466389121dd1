"""Prediction: by a run or an exported model, and the files that it writes."""

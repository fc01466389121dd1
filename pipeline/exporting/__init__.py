"""Export: one graph from pixels to probabilities, its formats, and what opens them again."""

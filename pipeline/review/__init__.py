"""A local page where people correct labels and a head learns at once."""

"""Heads: one interface, its kinds, and how they are trained, alone or as a bank."""

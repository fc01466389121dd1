"""Nearest neighbours among cached features, and what is chosen by them. May import ``heads`` and below.

    store --Vectors--> rows of length 1, a piece at a time --nearest | nearest_of_all--> row numbers, cosines

Use ``Vectors``, ``nearest`` and ``nearest_of_all``.
"""

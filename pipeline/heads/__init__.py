"""Heads: the small models trained on cached features, all behind ``Head``. May import ``runs``, ``scores`` and the ground.

    store --gather--> rows --fitting--> trained head --records--> run folder

``kinds`` makes and loads heads; ``classifiers``, ``dense`` and ``bank`` train them. Use ``make_head``, ``head_of``,
``fit_head``, ``Source``. A new kind is one class and one row.
"""

"""Heads: the small models trained on cached features, all behind ``Head``. May import ``runs``, ``scores`` and the ground.

    store --gather--> rows --fitting--> trained head --records--> run folder

``kinds`` makes and loads heads; ``classifiers``, ``dense`` and ``bank`` train them. Other rooms use ``make_head``,
``head_of``, ``fit_head`` and ``Source``. A new kind of head is one class and one row in ``kinds``.
"""

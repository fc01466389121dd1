"""Scores of predictions, and the choice of a head. Works on numpy arrays; imports the ground only.

    probabilities, labels --evaluate()--> scores --choose()--> one of several

Other rooms use ``evaluate``, ``stratified_folds`` and ``choose``.
"""

"""How good predictions are, and which head to choose. Pure numpy; imports the ground only.

    probabilities, labels --evaluate()--> scores --choose()--> one of several

Use ``evaluate``, ``stratified_folds``, ``choose``.
"""

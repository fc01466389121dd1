"""What predicts new images, and how predictions are written. May import ``exporting``, ``tuning``, ``heads`` and below.

    run | artefact --> Model: image file -> pixels -> probabilities --> rows of CSV or JSON lines

Use ``RunModel``, ``ArtefactModel`` and ``destination``.
"""

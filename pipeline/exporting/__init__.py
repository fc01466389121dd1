"""Export: one file or folder that turns pixels into probabilities. May import ``tuning``, ``heads`` and what lies below.

    network + head --assemble--> Keras model --a row of FORMATS--> artefact with a card

Use ``FORMATS`` and ``convert``, ``assemble``, ``open_artefact``. A new format is one row of ``formats``.
"""

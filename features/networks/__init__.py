"""Frozen networks: what they are, where their weights are found, and the engines that run them. Imports the ground.

    options --resolve_network()--> Network: recipes --engine()--> function of batches

``backbones`` is the table of networks, ``weights`` finds and loads files, ``engines`` chooses what runs them.
Use ``resolve_network``, ``Network`` and the ``Engine`` protocol.
"""

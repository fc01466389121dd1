"""Frozen networks: the table of them, where their weights are found, and the engines that run them.

    options --resolve_network()--> Network: recipes --engine()--> function of batches

``backbones`` holds the table of networks, ``weights`` finds and loads weights files, ``engines`` chooses an engine.
Other rooms use ``resolve_network``, ``Network`` and the ``Engine`` protocol. This room imports only the ground modules.
"""

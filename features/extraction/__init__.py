"""Stage one: decide what is missing, make it in shards, assemble the store. Imports every other room.

    plan (writes nothing) -> shards (read | infer | write) -> journal -> assembly -> store

Use ``Extraction``, ``prepare``, ``extract_features`` and ``pack_store`` of ``extraction``, and ``ExtractionOptions``.
"""

"""Stage one: find out which features are missing, compute them in shards, and assemble the store.

    plan (writes nothing) -> shards (read | infer | write) -> journal -> assembly -> store

Callers use ``Extraction``, ``prepare``, ``extract_features`` and ``pack_store`` of ``extraction``, and
``ExtractionOptions``. This room imports every other room.
"""

"""The HDF5 file: its schema, a writer, and a reader that trusts nothing. May import ``sources.splits`` and the ground.

    arrays --StoreWriter--> file --FeatureStore--> verified arrays        FORMAT.md says what a file holds

Use ``FeatureStore`` and the tables of ``schema``. ``untrusted`` checks the structure of a file before it is read.
"""

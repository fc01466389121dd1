"""The HDF5 file: its schema, the writer, and a reader that trusts nothing. Imports ``sources.splits`` and the ground.

    arrays --StoreWriter--> file --FeatureStore--> verified arrays        FORMAT.md says what a file holds

Use ``FeatureStore`` and the tables of ``schema``; ``untrusted`` checks how a file is built before it is read.
"""

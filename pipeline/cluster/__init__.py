"""Shards and sweeps on many machines, through Dask. May import ``heads``, ``sweeps`` and what lies below.

    plan file --> workers make shards --> this process enters them        README.md says how to set it up

Use ``ClusterShards`` (a ``ShardRunner`` for extraction) and ``sweeping``.
"""

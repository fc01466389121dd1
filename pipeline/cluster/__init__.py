"""The same shards and sweeps on a Dask cluster."""

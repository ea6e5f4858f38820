"""Data sources, partitioners, the trusted set, and the federation that they make up.

A source (``digits``, ``npz``, ``image_parquet``) decodes its files once into uint8 arrays; ``cache`` keeps them on disk
and opens them memory-mapped, so that all worker processes share one copy. ``partition_iid`` and ``partition_dirichlet``
split the training samples among the clients, ``trusted`` takes the server's samples out first, and ``assemble`` does
both from the scenario's seed. Nothing is ever downloaded.
"""

"""Data sources, partitioners, the trusted set, and the federation that they make up.

A source (``npz``, ``image_parquet``, ``image_folder``, torchvision's sets, ``digits``, ``generated``) decodes its files
once into uint8 arrays; ``cache`` keeps them on disk and opens them memory-mapped, so that all worker processes share
one copy. The ``partition_*`` modules split the training samples among the clients, ``trusted`` takes the server's
samples out first, and ``assemble`` does both from the scenario's seed. Nothing is downloaded unless ``data.download``
says so.
"""

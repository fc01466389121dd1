"""Where images, labels, groups and given splits come from. May import ``pixels`` and the ground.

    path --scan()--> ImageSet: paths, labels, splits, groups, and a function that reads the bytes of one image

``scan`` is the entry point; ``folders archives arrays manifests webdataset parquet arrow remote sample`` each read one kind of source;
``blocks`` are files of many images in buckets; ``splits`` makes splits.
"""

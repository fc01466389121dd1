"""Where images, labels, groups and given splits come from. May import ``pixels`` and the ground.

    path --scan()--> ImageSet: paths, labels, splits, groups, and a function that reads the bytes of one image

``scan`` is the door; ``folders archives arrays manifests sample`` are the kinds of source; ``splits`` makes splits.
"""

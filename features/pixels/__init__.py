"""From bytes to pixels: decoding, resizing, augmented views, and the loop that makes batches. May import the ground.

    bytes --decode (jpeg), resizing--> uint8 pixels of one image --views--> of all its views --batches--> a forward pass

``processes`` does all but the last in processes of their own. Use ``decode_image``, ``decode_views`` and ``batches``; ``png``
writes arrays as files.
"""

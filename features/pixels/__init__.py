"""From bytes to pixels: decoding, resizing, augmented views, and the loop that makes batches. May import the ground.

    bytes --decode (jpeg), resizing--> uint8 pixels of one image --views--> of all its views --batches--> one forward pass after another

Use ``decode_image``, ``decode_views`` and ``batches``; ``png`` writes arrays as files.
"""

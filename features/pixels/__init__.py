"""From bytes to pixels: decoding, resizing, augmented views, and the loop that makes batches. May import the ground.

    bytes --decode (jpeg), resizing--> uint8 pixels of one image --views--> of all its views --batches--> a forward pass

``scientific`` reads what Pillow does not (``npy tiff dicom``), and ``samples`` makes 8-bit RGB of it by the recipe.
``processes`` does all but the last in processes of their own. Use ``decode_image``, ``decode_views`` and ``batches``; ``png``
writes arrays as files.
"""

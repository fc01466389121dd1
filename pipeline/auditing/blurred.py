"""The check ``blurred``: it has no sharp edge.

`Pixels.sharpness` --bound--> flags
"""

from __future__ import annotations

from pipeline.auditing.check import Finding, flag_below
from pipeline.auditing.material import Material

LEAST = 0.1  # 1 of 522 photographs of pets and flowers lie below it, and 99 % of them when blurred by 2 pixels of 256


class Blurred:
    """Images whose ``sharpness`` is below `LEAST`."""

    name, about, pixels = "blurred", "it has no sharp edge", True

    def __call__(self, material: Material) -> Finding:
        """Judge all images that can be read."""
        return flag_below(material, material.pixels.sharpness, LEAST, "blurred")

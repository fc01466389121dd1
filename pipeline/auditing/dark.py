"""The check ``dark``: its brightest pixels are dark.

`Pixels.brightness` --bound--> flags
"""

from __future__ import annotations

from pipeline.auditing.check import Finding, flag_below
from pipeline.auditing.material import Material

LEAST = 0.32  # the darkest of 522 photographs of pets and flowers has 0.51


class Dark:
    """Images whose ``brightness`` is below `LEAST`."""

    name, about, pixels = "dark", "its brightest pixels are dark", True

    def __call__(self, material: Material) -> Finding:
        """Judge all images that can be read."""
        return flag_below(material, material.pixels.brightness, LEAST, "dark")

"""The check ``flat``: it is of nearly one colour.

`Pixels.spread` --bound--> flags
"""

from __future__ import annotations

from pipeline.auditing.check import Finding, flag_below
from pipeline.auditing.material import Material

LEAST = 0.04  # the flattest of 522 photographs of pets and flowers has 0.11


class Flat:
    """Images whose ``spread`` is below `LEAST`."""

    name, about, pixels = "flat", "it is of nearly one colour", True

    def __call__(self, material: Material) -> Finding:
        """Judge all images that can be read."""
        return flag_below(material, material.pixels.spread, LEAST, "flat")

"""Read the pixels of a DICOM file: values, rescale and window, and nothing else of it (extra ``dicom``: pydicom).

    file --only these tags--> pixel values --rescale--> Samples, with the window as black and white

No other tag is parsed, kept or shown: neither names nor dates of patients get into stores, logs or messages.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from features.errors import UnreadableImageError
from features.machine import how_to_install
from features.pixels.samples import Range, Samples
from features.recipe import PixelRule

Admit = Callable[[int, int, int], None]
# fmt: off
_TAGS = (
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleIntercept",
    "RescaleSlope", "ModalityLUTSequence", "VOILUTSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "PixelData",
)
# Transfer syntaxes (PS3.6, table A-1) that are read: without compression, RLE by pydicom, and the last three by Pillow.
_SYNTAXES = frozenset({
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91",
})
# fmt: on
_COLOURS = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")


def is_dicom(data: bytes) -> bool:
    """Whether a file begins like DICOM (PS3.10, 7.1)."""
    return data[128:132] == b"DICM"


def read_dicom(data: bytes, rule: PixelRule, admit: Admit) -> Samples:
    """Read one frame.

    Raises
    ------
    UnreadableImageError
        If pydicom is not installed, or the file is damaged or of a kind that is not read; the message names it, and says
        nothing of what the file holds otherwise.
    """
    try:
        pydicom = importlib.import_module("pydicom")
    except ImportError:
        raise _refuse(f"reading it needs pydicom: {how_to_install('dicom')}") from None
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=list(_TAGS))
        syntax = dataset.file_meta.TransferSyntaxUID
        index = _checked(dataset, syntax, rule)
        width, height = int(dataset.Columns), int(dataset.Rows)
        admit(width, height, width * height * int(dataset.SamplesPerPixel) * (int(dataset.BitsAllocated) // 8 + 8))
        values = pydicom.pixels.pixel_array(dataset, index=index, raw=False, decoding_plugin=_plugin(syntax))
        return _described(dataset, values)
    except UnreadableImageError:
        raise
    except Exception as error:  # noqa: BLE001  its text may quote the file
        raise _refuse(f"damaged ({type(error).__name__})") from None


def _refuse(problem: str) -> UnreadableImageError:
    return UnreadableImageError("unreadable", f"DICOM: {problem}")


def _plugin(syntax: str) -> str:
    return "pillow" if ".2.4." in syntax else "pydicom" if syntax.endswith(".2.5") else ""


def _checked(dataset: Any, syntax: Any, rule: PixelRule) -> int:
    """Refuse what is not read; return the index of the frame."""
    if syntax not in _SYNTAXES:
        raise _refuse(
            f"compressed as {syntax.name}, which Pillow cannot read; save it uncompressed, for example with dcmdjpeg"
        )
    if "PixelData" not in dataset:
        raise _refuse("no pixels of whole numbers")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if (frames > 1) and not rule.frame:
        raise _refuse(f"{frames} frames; take one of them with --frame 1 to --frame {frames}")
    if rule.frame > frames:
        raise _refuse(f"no frame {rule.frame}, it has {frames}")
    groups = ("ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    if found := [name for name in groups if name in dataset]:
        raise _refuse(f"rescaled by {found[0]}, which is not read; save it as a plain image with RescaleSlope")
    if dataset.PhotometricInterpretation not in _COLOURS or int(dataset.BitsAllocated) not in (8, 16, 32):
        raise _refuse(f"expected one of {', '.join(_COLOURS)} with 8, 16 or 32 bits; save it so")
    return max(0, rule.frame - 1)


def _described(dataset: Any, values: np.ndarray) -> Samples:
    """Apply the rescale (PS3.3, C.11.1), and say what the window makes black and white (C.11.2)."""
    bits, signed = int(dataset.BitsStored), bool(dataset.PixelRepresentation)
    full = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    if int(dataset.SamplesPerPixel) > 1:
        return Samples("DICOM", values, full, full)
    slope, intercept = (
        float(dataset.get(name, default)) for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    if (slope, intercept) != (1.0, 0.0):
        values = values.astype(np.float64) * slope + intercept
        full = (min(slope * end + intercept for end in full), max(slope * end + intercept for end in full))
    shown: Range | None = full
    if "WindowCenter" in dataset and "WindowWidth" in dataset:
        shown = _window(
            _first(dataset.WindowCenter), _first(dataset.WindowWidth), dataset.get("VOILUTFunction") or "LINEAR"
        )
    elif "VOILUTSequence" in dataset:
        shown = None
    return Samples("DICOM", values[..., None], full, shown, inverted=dataset.PhotometricInterpretation == "MONOCHROME1")


def _first(value: Any) -> float:
    """Return the first of the windows that a file offers."""
    return float(value) if not hasattr(value, "__getitem__") or isinstance(value, str) else float(value[0])


def _window(centre: float, width: float, function: str) -> Range | None:
    """Return the values that a window makes black and white; None for one that is no straight line."""
    if function == "LINEAR" and width >= 1:
        return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    return (centre - width / 2, centre + width / 2) if function == "LINEAR_EXACT" and width > 0 else None

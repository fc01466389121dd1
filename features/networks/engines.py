"""The interface of all engines, and the choice of the engine and device that run a network.

    options, engines of the kind of network --choose_engine()--> "keras", "onnxruntime" or "openvino"

The choice imports neither of them: the engines are in ``features.networks.keras_engine`` and ``openvino_engine``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from features.errors import ConfigurationError
from features.machine import has_bfloat16, how_to_install, keras_backend, may_have_gpu
from features.networks import onnx_engine
from features.networks.openvino_engine import is_installed
from features.recipe import NetworkOptions, check_device

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """A network as a function from batches of pixels to features.

    Attributes
    ----------
    name : str
        Name recorded in the store: ``openvino``, ``keras-tensorflow``, ...
    device : {"cpu", "gpu"}
        Where it runs. On ``cpu`` it competes with decoding for the processor cores.
    concurrent : bool
        Whether several threads may call it at the same time.
    """

    name: str
    device: str
    concurrent: bool

    def __call__(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Compute the features of one batch.

        Parameters
        ----------
        images : uint8, (n, h, w, 3), 0-255, n <= the batch size
            RGB pixels.

        Returns
        -------
        dict of str to float32, or the stored dtype, (n, ...)
            Features by name of the feature set.
        """
        ...


def engine_names() -> tuple[str, ...]:
    """Return the names of the installed engines, without importing them."""
    installed = {"openvino": is_installed(), "onnxruntime": onnx_engine.is_installed()}
    return ("keras", *(name for name, there in installed.items() if there))


def choose_engine(options: NetworkOptions, engines: Sequence[str] = ("keras", "openvino")) -> str:
    """Choose the engine: for ``auto``, OpenVINO on a CPU if it is installed and supports the precision, else the kind's own.

    Parameters
    ----------
    options : NetworkOptions
        The options of the network.
    engines : sequence of str
        Engines that run this kind of network, its own first.

    Raises
    ------
    ConfigurationError
        If an engine is requested that does not run this kind of network, or with a precision or device that it does not
        support.
    """
    engine, precision, device = options.engine, options.precision, options.device
    own = engines[0]
    if precision == "int8":
        return _engine_of_int8(engine, device)
    if engine not in ("auto", *engines):
        raise ConfigurationError(f"engine: received {engine!r}, expected {' or '.join(engines)} for {options.backbone}")
    can = precision != "float16" and device != "gpu"
    if engine == "openvino" and not can:
        raise ConfigurationError(
            f"engine: openvino runs only on the CPU, in float32 or bfloat16; received precision {precision} and "
            f"device {device}. Omit --engine, or use --engine {own}."
        )
    without = precision == "bfloat16" and not has_bfloat16()
    fits = can and is_installed() and not without
    # OpenVINO converts what TensorFlow traces; the conversion has failed with the other Keras backends.
    converts = own != "keras" or keras_backend() == "tensorflow"
    chosen = (
        "openvino"
        if engine != own and fits and (engine == "openvino" or (converts and not may_have_gpu(device)))
        else own
    )
    if chosen == "onnxruntime" and precision != "float32":
        raise ConfigurationError(
            f"precision: onnxruntime computes in float32; received {precision}. For bfloat16 use --engine openvino on a "
            "processor that has it" + (", unlike this one" if without else "")
        )
    if engine == "openvino" and not is_installed():
        logger.warning("OpenVINO is not installed (%s); using %s", how_to_install("openvino"), own)
    if without:
        instead = (
            f", so OpenVINO does not compute in it; using {own}" if engine == "openvino" and is_installed() else ""
        )
        slow = "" if may_have_gpu(device) else ". It is slower than float32 here"
        if instead or slow:
            logger.warning("this processor has no bfloat16 instructions%s%s", instead, slow)
    return chosen


def _engine_of_int8(engine: str, device: str) -> str:
    """Return the engine that runs quantised networks, whatever the kind; refuse others."""
    if engine not in ("auto", "openvino") or device.partition(":")[0] == "gpu":
        raise ConfigurationError(
            f"precision: int8 runs with openvino on the processor only; received engine {engine} and device {device}. Leave "
            "both out, or choose another --precision"
        )
    if not is_installed():
        raise ConfigurationError(
            f"precision: int8 needs OpenVINO, which is not installed: {how_to_install('openvino')}"
        )
    return "openvino"


def choose_device(device: str) -> str:
    """Choose the device: for ``auto``, the GPU if Keras's backend finds one, else the CPU.

    Raises
    ------
    ConfigurationError
        If the name is unknown, or ``gpu`` is requested and the backend finds none.
    """
    check_device(device)
    if device == "cpu":
        return "cpu"
    seen = _gpu_count()
    if device == "auto" and not seen and may_have_gpu():
        logger.warning(
            "there is a GPU, but Keras does not see it and runs on the CPU. Install the CUDA build of the backend "
            "(%s), or use --device cpu, which may run OpenVINO",
            _cuda_build(),
        )
    if device == "gpu" and not seen:
        raise ConfigurationError(
            f"device: a GPU was asked for, but Keras sees none. Install the CUDA build of the backend ({_cuda_build()}) "
            "and check the driver with nvidia-smi, or use --device auto."
        )
    return "gpu" if seen else "cpu"


def _cuda_build() -> str:
    """Say how to install what runs Keras's backend on a GPU."""
    builds = {"jax": "pip install 'jax[cuda12]'", "torch": "pip install torch, see https://pytorch.org"}
    return builds.get(keras_backend(), "pip install 'tensorflow[and-cuda]'")


def _gpu_count() -> int:
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return int(torch.cuda.device_count())
    if keras.backend.backend() == "jax":  # list_devices("gpu") raises an error if there is no GPU
        import jax

        return sum(device.platform == "gpu" for device in jax.devices())
    return len(keras.distribution.list_devices("gpu"))

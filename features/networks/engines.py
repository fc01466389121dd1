"""Which engine runs a network, decided without importing any; and what every engine is.

    options --choose_engine()--> "keras" or "openvino"

Keras's engine is in ``features.networks.keras_engine``, OpenVINO's in ``features.networks.openvino_engine``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from features.errors import ConfigurationError
from features.machine import has_bfloat16, keras_backend, may_have_gpu
from features.networks.openvino_engine import is_installed
from features.recipe import NetworkOptions, check_device

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """A network as a function of batches of bytes.

    Attributes
    ----------
    name : str
        What is noted in the store: ``openvino``, ``keras-tensorflow``, ...
    device : {"cpu", "gpu"}
        Where it runs. On ``cpu`` it shares the processors with decoding.
    concurrent : bool
        Whether several threads may call it at the same time.
    """

    name: str
    device: str
    concurrent: bool

    def __call__(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Features of one batch.

        Parameters
        ----------
        images : uint8, (n, h, w, 3), 0-255, n <= the batch size
            RGB pixels.

        Returns
        -------
        dict of str to float32, (n, ...)
            Features by feature set.
        """
        ...


def engine_names() -> tuple[str, ...]:
    """Engines that are installed; none is imported."""
    return ("keras", "openvino") if is_installed() else ("keras",)


def choose_engine(options: NetworkOptions) -> str:
    """``auto`` -> ``openvino`` on processors where it is installed and has the precision, else ``keras``.

    Raises
    ------
    ConfigurationError
        If OpenVINO is asked for something that it does not do.
    """
    engine, precision, device = options.engine, options.precision, options.device
    can = precision != "float16" and device != "gpu"
    if engine == "openvino":
        if not can:
            raise ConfigurationError(
                f"engine: openvino computes in float32 or bfloat16 on processors; received precision {precision} and "
                f"device {device}. Leave --engine out, or give --engine keras."
            )
        if not is_installed():
            logger.warning("OpenVINO is not installed (pip install 'bottleneck-features[openvino]'); Keras is used")
        elif precision == "bfloat16" and not has_bfloat16():
            logger.warning("OpenVINO has no bfloat16 on this processor; Keras is used")
    if precision == "bfloat16" and not has_bfloat16() and not may_have_gpu(device):
        logger.warning("this processor has no bfloat16: it is computed all the same, but slower than float32")
    fits = can and is_installed() and (precision == "float32" or has_bfloat16())
    # It converts what TensorFlow traces; other backends' networks have failed.
    wanted = engine == "openvino" or (not may_have_gpu(device) and keras_backend() == "tensorflow")
    return "openvino" if engine != "keras" and fits and wanted else "keras"


def choose_device(device: str) -> str:
    """``auto`` -> ``gpu`` where Keras's backend sees one, else ``cpu``.

    Raises
    ------
    ConfigurationError
        If the name is unknown, or a GPU is asked for and none is seen.
    """
    check_device(device)
    if device == "cpu":
        return "cpu"
    seen = _gpu_count()
    if device == "auto" and not seen and may_have_gpu():
        logger.warning(
            "there is a GPU, but Keras sees none and runs on the processors. Install the CUDA build of the backend "
            "(pip install 'tensorflow[and-cuda]'), or give --device cpu, which may use OpenVINO"
        )
    if device == "gpu" and not seen:
        raise ConfigurationError(
            "device: a GPU was asked for, but Keras sees none. Install the CUDA build of the backend "
            "(pip install 'tensorflow[and-cuda]') and check the driver with nvidia-smi, or use --device auto."
        )
    return "gpu" if seen else "cpu"


def _gpu_count() -> int:
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return int(torch.cuda.device_count())
    if keras.backend.backend() == "jax":  # list_devices("gpu") raises where there is none
        import jax

        return sum(device.platform == "gpu" for device in jax.devices())
    return len(keras.distribution.list_devices("gpu"))

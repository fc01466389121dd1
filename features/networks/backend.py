"""Load Keras and its backend, and hold back the messages that the backend writes to stderr meanwhile."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from features.cache import cache_path
from features.errors import ConfigurationError
from features.machine import how_to_install, keras_backend
from features.temporary import system_folder

logger = logging.getLogger(__name__)
_left_out: list[str] = []
_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",  # its errors are raised; what it only says at level 2 is none, such as of oneDNN on some processors
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
_OUT_OF_MEMORY = (  # letters of an error's class and text
    "outofmemory",  # torch, CUDA, HIP; CUDA_ERROR_OUT_OF_MEMORY
    "resourceexhausted",  # TensorFlow, JAX
    "allocfailed",  # CUDNN_STATUS_ALLOC_FAILED, CUBLAS_STATUS_ALLOC_FAILED
    "allocationfailed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "failedtoallocate",  # XLA, ONNX Runtime
    "dsttensorisnotinitialized",  # TensorFlow, where a batch cannot be copied to the GPU
    "tallocatememory",  # torch on a processor: can't allocate memory
    "notenoughmemory",
)


def leave_out(*modules: str) -> None:
    """Let ``load_keras`` load Keras without these modules, if this process has not loaded them.

    Keras imports scikit-learn, matplotlib and pandas for its wrappers, galleries and tables, which is a third of its start.
    It takes them for not installed, so this is for programs that hand it none of theirs; they import them as usual.
    """
    _left_out[:] = modules


def load_keras() -> Any:
    """Import Keras and start its backend, unless that was done before, with exact products (see `exact_float32`).

    TensorFlow and JAX then take memory of a GPU as they need it, and not all of it at once.

    Raises
    ------
    ConfigurationError
        If the backend that ``KERAS_BACKEND`` names cannot be started.
    """
    if "keras" not in sys.modules:
        _start_keras()
    _exact_once()
    return sys.modules["keras"]


def _start_keras() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["KERAS_BACKEND"] = keras_backend()  # also of the processes that are started from here
    if keras_backend() == "jax":  # which looks for the folder once, when it compiles first; nobody else can write there
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_path("jax")))
    logging.getLogger("tensorflow").addFilter(_is_news)
    with held_back(), _without(name for name in _left_out if name not in sys.modules):
        try:
            import keras

            keras.ops.convert_to_numpy(keras.ops.zeros(1))  # the backend looks for devices now, while it is silenced
        except (ImportError, ValueError) as error:
            raise ConfigurationError(
                f"Keras cannot start with KERAS_BACKEND={os.environ['KERAS_BACKEND']!r}: {error}. Install that backend "
                "(pip install tensorflow, or jax, or torch), or unset KERAS_BACKEND."
            ) from error


def exact_float32() -> None:
    """Turn TensorFloat-32 off in this process: GPUs multiply with 10 bits in it, which changes features by 1e-3."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)
    elif backend == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
    elif backend == "torch":
        import torch

        backends = torch.backends
        backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
        if hasattr(backends, "fp32_precision"):  # since torch 2.9; each of them may have been set
            for part in (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn):
                part.fp32_precision = "ieee"


_exact_once = functools.cache(exact_float32)


def place_of(device: str) -> str:
    """Return Keras's name of a device, for ``keras.device``.

    On torch, ``cpu:0`` is another device than the ``cpu`` of the weights: they were copied at every pass.
    """
    return "cpu" if device == "cpu" else f"{device}:0"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the device or of this machine, did not suffice.

    Backends have classes of their own for this (``torch.OutOfMemoryError``, TensorFlow's ``ResourceExhaustedError``),
    codes in the text (JAX's ``RESOURCE_EXHAUSTED``), and texts of the libraries below them (``CUBLAS_STATUS_ALLOC_FAILED``).
    An error that followed from one of these counts too, such as that of a CUDA graph whose capture could not be ended.
    """
    said = re.sub(r"[^a-z]", "", f"{type(error).__name__} {error}".lower())
    if isinstance(error, MemoryError) or any(sign in said for sign in _OUT_OF_MEMORY):
        return True
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return before is not None and is_out_of_memory(before)


def load_keras_hub(path: Path) -> Any:
    """Import KerasHub for the network of a file, and say which package is missing if that fails.

    KerasHub runs without TensorFlow Text and without Kaggle's package, which it needs only for texts and downloads.
    """
    load_keras()
    try:
        with held_back():
            import keras_hub
    except ImportError as error:
        missing = (error.name or "keras_hub").partition(".")[0].replace("_", "-")
        raise ConfigurationError(
            f"{path} is a network of KerasHub, and the package {missing} is not installed here: pip install keras-hub (or "
            f"{how_to_install('keras-hub')}). Its large tensorflow-text is not needed: pip install --no-deps keras-hub, and "
            "pip install regex tokenizers sentencepiece"
        ) from error
    return keras_hub


def _is_news(record: logging.LogRecord) -> bool:
    """Filter out TensorFlow's retracing warning, which is false when a new function reuses the address of an old one."""
    return "triggered tf.function retracing" not in str(record.msg)


@contextlib.contextmanager
def _without(modules: Iterable[str]) -> Iterator[None]:
    """Make the import of these modules fail in a block."""
    hidden = dict.fromkeys(modules)
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None means: there is no such module
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back what this thread writes to stderr, and C++ in any thread, and drop it at the end.

    It is passed on if an exception ends the block, or if the process dies in it. What other threads write through
    ``sys.stderr``, such as messages and bars, is shown at once.
    """
    sys.stderr.flush()
    try:
        terminal = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    with contextlib.ExitStack() as stack:
        with system_folder() as folder:  # the file loses its name at once, so that a dead process leaves none
            held = stack.enter_context(open(folder / "stderr", "wb"))
            written = stack.enter_context(open(folder / "stderr", "rb"))
        with _shown_after_death(written, terminal), _others_shown(terminal):
            os.dup2(held.fileno(), 2)
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError):  # stderr is full or broken
                    os.write(terminal, written.read())
                raise
            finally:
                sys.stderr.flush()
                os.dup2(terminal, 2)
                os.close(terminal)
        logger.debug("held back: %s", written.read().decode(errors="replace"))


@contextlib.contextmanager
def _others_shown(terminal: int) -> Iterator[None]:
    """Let all threads but this one write to the terminal through ``sys.stderr``."""
    with open(os.dup(terminal), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as shown:
        before, threads = sys.stderr, _Threads(sys.stderr, shown)
        sys.stderr = threads
        try:
            yield
        finally:
            threads.end()  # a library may have kept it
            if sys.stderr is threads:
                sys.stderr = before


class _Threads:
    """A text stream that is ``held`` for the thread that made it, and ``shown`` for others until `end` is called."""

    def __init__(self, held: TextIO, shown: TextIO) -> None:
        self._held, self._maker, self._lock = held, threading.get_ident(), threading.Lock()
        self._shown: TextIO | None = shown

    @property
    def _stream(self) -> TextIO:
        return self._held if self._shown is None or threading.get_ident() == self._maker else self._shown

    def write(self, text: str) -> int:
        with self._lock:
            return self._stream.write(text)

    def flush(self) -> None:
        with self._lock:
            self._stream.flush()

    def isatty(self) -> bool:
        with self._lock:
            return self._stream.isatty()

    def end(self) -> None:
        with self._lock:
            self._shown = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)


@contextlib.contextmanager
def _shown_after_death(written: BinaryIO, terminal: int) -> Iterator[None]:
    """Let a shell wait for a line of this process; if the process dies without it, the shell prints what was written."""
    try:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", "read -r line || cat <&1 >&2"],
            stdin=subprocess.PIPE,
            stdout=written,
            stderr=terminal,
            start_new_session=True,
        )
    except OSError:  # no such shell, or no more processes
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            shell.communicate(b"\n")

"""Load Keras and its backend, and suppress the start-up messages that the backend writes to stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from features.errors import ConfigurationError

# TensorFlow 2.21 writes these lines from C++ regardless of TF_CPP_MIN_LOG_LEVEL. All other lines are passed on.
_CHATTER = re.compile(
    rb"WARNING: All log messages before absl|I\d{4} |To enable the following instructions|"
    rb"E\d{4} .*failed call to cuInit.*UNKNOWN ERROR \(303\)"  # no driver means no GPU, which is not an error
)


def load_keras() -> Any:
    """Import Keras and start its backend, unless that was done before.

    Raises
    ------
    ConfigurationError
        If the backend that ``KERAS_BACKEND`` names cannot be started.
    """
    if "keras" in sys.modules:
        return sys.modules["keras"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("tensorflow").addFilter(_is_news)
    with _without_chatter():
        try:
            import keras

            keras.ops.convert_to_numpy(keras.ops.zeros(1))  # the backend looks for devices now, while it is silenced
        except (ImportError, ValueError) as error:
            raise ConfigurationError(
                f"Keras cannot start with KERAS_BACKEND={os.environ.get('KERAS_BACKEND', 'tensorflow')!r}: {error}. "
                "Install that backend (pip install jax, or torch), or unset KERAS_BACKEND."
            ) from error
    return keras


def _is_news(record: logging.LogRecord) -> bool:
    """Filter out TensorFlow's retracing warning, which is false when a new function reuses the address of an old one."""
    return "triggered tf.function retracing" not in str(record.msg)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Collect what is written to file descriptor 2, and at the end pass on all lines but ``_CHATTER``."""
    sys.stderr.flush()
    try:
        terminal = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            held.seek(0)
            kept = [line for line in held.read().splitlines(keepends=True) if not _CHATTER.match(line)]
            with contextlib.suppress(OSError):  # stderr is full or broken
                os.write(terminal, b"".join(kept))
            os.close(terminal)

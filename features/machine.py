"""Processors, GPUs, memory and software of this machine, found without importing a heavy library."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import resource
import sys
from pathlib import Path

# Device files of the NVIDIA and AMD drivers and of WSL (Linux on Windows). Without any of them there is no GPU.
_GPU_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions (AVX512-BF16, AMX or Arm's extension), according to Linux."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


@functools.cache
def processor() -> str | None:
    """Return the model and the instructions of the processor, as Linux tells them; None elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return None
    wanted = (
        "vendor_id",
        "cpu family",
        "model",
        "model name",
        "stepping",
        "flags",
        "CPU implementer",
        "CPU part",
        "Features",
    )
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in wanted) or None


def may_have_gpu(device: str = "auto") -> bool:
    """Whether a GPU may be present, so that it is worth asking Keras for one."""
    return device != "cpu" and any(Path(node).exists() for node in _GPU_NODES)


def usual_batch(engine: str, device: str) -> int:
    """Return the number of images in one forward pass if the user gives none: 256 where Keras may have a GPU, else 32."""
    return 256 if engine in ("auto", "keras") and may_have_gpu(device) else 32


def peak_memory() -> int:
    """Return the peak memory of this process in bytes.

    ``VmHWM`` is used where it exists, because the maximum of ``getrusage`` starts at that of the parent process.
    """
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keras_backend() -> str:
    """Return the backend that Keras uses or would use (https://keras.io/getting_started/#configuring-your-backend)."""
    if "keras" in sys.modules:
        return str(sys.modules["keras"].backend.backend())
    named = os.environ.get("KERAS_BACKEND")
    if named:
        return named
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        return str(json.loads((home / "keras.json").read_bytes())["backend"])
    except (OSError, ValueError, KeyError, TypeError):
        return "tensorflow"


def software_versions() -> dict[str, str]:
    """Return the versions of the software that affects the features, read without importing it."""
    names = ("bottleneck-features", "tensorflow", "keras", "openvino", "h5py", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: installed_version(name) for name in names}}


@functools.cache
def installed_version(name: str, otherwise: str = "not installed") -> str:
    """Return the version of an installed distribution from its metadata, else ``otherwise``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return otherwise

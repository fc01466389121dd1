"""Processors, GPUs, memory and software of this machine, found without importing a heavy library."""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import resource
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from features.errors import ConfigurationError, SourceError

_BACKENDS = ("tensorflow", "jax", "torch")  # of Keras, in the order in which they are taken
VISIBLE = "CUDA_VISIBLE_DEVICES"
HOSTS = "BOTTLENECK_ALLOW_HOSTS"  # hosts inside a private network that addresses may reach, with commas
_CARDS = "/dev/nvidia[0-9]*"
# Device files of the NVIDIA and AMD drivers and of WSL (Linux on Windows). Without any of them there is no GPU.
_GPU_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")


@contextlib.contextmanager
def hosts_allowed(hosts: str) -> Iterator[None]:
    """Allow hosts meanwhile, here and in the processes that are started, beside those of the environment.

    Parameters
    ----------
    hosts : str
        Names of hosts inside a private network, with commas between them.
    """
    before = os.environ.get(HOSTS)
    try:
        if hosts:
            os.environ[HOSTS] = f"{before},{hosts}" if before else hosts
        yield
    finally:
        if hosts:
            os.environ.pop(HOSTS)
            os.environ.update({HOSTS: before} if before else {})


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
    """Whether a GPU may be present and is not hidden from this process, so that it is worth asking Keras for one."""
    hidden = os.environ.get(VISIBLE, "0").strip() in ("", "-1")
    return device != "cpu" and not hidden and any(Path(node).exists() for node in _GPU_NODES)


def gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, as the environment variable `VISIBLE` names them."""
    named = os.environ.get(VISIBLE)
    if named is None:
        return [str(number) for number in range(len(glob.glob(_CARDS)))]
    cards = (card.strip() for card in named.split(","))
    return list(itertools.takewhile(lambda card: card not in ("", "-1"), cards))


def take_device(device: str) -> str:
    """Let this process, and those that it starts, see no other GPU than it is to use.

    Everything then runs where the network runs, and no memory is taken on other cards.

    Parameters
    ----------
    device : str
        ``auto``, ``cpu``, ``gpu``, or ``gpu:K``, where K counts as ``nvidia-smi`` does, within `VISIBLE` if that is set.

    Returns
    -------
    str
        The device without a number.

    Raises
    ------
    ConfigurationError
        If there is no such GPU, or a library that uses GPUs was imported before.
    """
    kind, numbered, number = device.partition(":")
    if device == "cpu" and may_have_gpu():
        os.environ |= {VISIBLE: "", "JAX_PLATFORMS": "cpu"}
    if kind != "gpu" or not numbered:
        return device
    cards = gpus()
    if not number.isdecimal() or int(number) >= len(cards):
        there = f"gpu:0 to gpu:{len(cards) - 1}" if len(cards) > 1 else "gpu:0" if cards else "no NVIDIA GPU"
        raise ConfigurationError(f"device: received {device!r}, but this process can use {there}; see nvidia-smi")
    if started := [name for name in _BACKENDS if name in sys.modules]:
        raise ConfigurationError(
            f"device: received {device!r}, but {started[0]} has been imported and sees all GPUs. Use gpu, and set {VISIBLE} "
            "before Python starts"
        )
    if VISIBLE not in os.environ:  # else its numbers are those of the order that CUDA had without us
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ[VISIBLE] = cards[int(number)]
    return kind


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
    """Return the backend that Keras uses or will use: the one that is named, if it is installed, else one that is.

    ``KERAS_BACKEND`` names it, else Keras's file, which Keras writes when it first runs
    (https://keras.io/getting_started/#configuring-your-backend).
    """
    if "keras" in sys.modules:
        return str(sys.modules["keras"].backend.backend())
    named = os.environ.get("KERAS_BACKEND")
    if named:
        return named
    try:
        chosen = str(json.loads(keras_settings().read_bytes())["backend"])
    except (OSError, ValueError, KeyError, TypeError):
        chosen = _BACKENDS[0]
    there = [name for name in _BACKENDS if importlib.util.find_spec(name) is not None]
    return there[0] if there and chosen in _BACKENDS and chosen not in there else chosen


def keras_settings() -> Path:
    """Return the path of Keras's file, which may be missing."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"


def software_versions() -> dict[str, str]:
    """Return the versions of the software that affects the features, read without importing it."""
    other = {keras_backend()} & {"jax", "torch"}
    names = ("bottleneck-features", "tensorflow", *other, "keras", "openvino", "h5py", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: installed_version(name) for name in names}}


@functools.cache
def installed_version(name: str, otherwise: str = "not installed") -> str:
    """Return the version of an installed distribution from its metadata, else ``otherwise``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return otherwise


def how_to_install(*extras: str) -> str:
    """Return the command that adds extras to this installation.

    In a checkout it names the checkout. Elsewhere it names the package, of which pip and uv take the copy that is
    installed: they ask an index for the packages of the extra only.

    Examples
    --------
    >>> how_to_install("review").startswith("pip install ")
    True
    """
    named = f"[{','.join(extras)}]"
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'bottleneck-features{named}'"
    place = "." if root == Path.cwd() else str(root)
    return f"pip install -e {shlex.quote(place + named)}"


def pyarrow_for(path: object) -> ModuleType:
    """Return pyarrow, which reads and writes Parquet; raises ``SourceError`` if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet

        return pyarrow  # type: ignore[no-any-return]
    except ImportError as error:
        raise SourceError(
            f"{path}: Parquet needs pyarrow: {how_to_install('parquet')}. Or save the manifest as CSV"
        ) from error

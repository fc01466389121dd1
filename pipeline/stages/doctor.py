"""Examine this machine: what is found, whether it will do, and how each thing that will not is mended.

    checks, one function each --> rows (what, state, found, fix) --> one table; exit code 1 if one failed

A further check is a function in ``CHECKS``. Nothing is downloaded, and no heavy library is imported.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from features.cache import wanted_folder
from features.errors import BottleneckError, WeightsError, WeightsNotFoundError
from features.files import printable
from features.machine import VISIBLE, how_to_install, installed_version, keras_backend, keras_settings, processors
from features.ownership import foreign
from features.temporary import temporary_path
from pipeline.tables import table_text

OK, NOTE, FAIL = "ok", "note", "FAIL"
PYTHONS = ((3, 11), (3, 14))  # from this to before that
LEAST_DISK = 1 << 30  # bytes
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
CARDS = "/dev/nvidia0"
DRIVER = Path("/proc/driver/nvidia/version")
# Backend -> how the names of packages that let it use a GPU begin, and what installs them
CUDA = {
    "tensorflow": ("nvidia-cudnn", "pip install 'tensorflow[and-cuda]'"),
    "jax": ("jax-cuda", "pip install 'jax[cuda12]'"),
    "torch": ("nvidia-cudnn", "install the CUDA build of torch by the command that https://pytorch.org names"),
}
SETTINGS = ("BOTTLENECK_DECODE_PROCESSES", "BOTTLENECK_DECODE_SECONDS")
_FILES = (".tar", ".parquet", ".csv")  # what is read in a bucket besides images
USUAL_NETWORKS = ("mobilenetv2", "vgg16")
# Extra of pyproject.toml -> the packages that it adds
EXTRAS = {
    "cluster": ("dask", "distributed"),
    "dicom": ("pydicom",),
    "export": ("tf2onnx", "onnxruntime", "ai-edge-litert", "openvino"),
    "int8": ("nncf", "openvino"),
    "jax": ("jax",),
    "jpeg": ("simplejpeg",),
    "keras-hub": ("keras-hub",),
    "mlflow": ("mlflow-skinny",),
    "onnx-backbones": ("onnxruntime", "openvino"),
    "openvino": ("openvino",),
    "parquet": ("pyarrow",),
    "remote": ("fsspec", "s3fs"),
    "review": ("starlette", "uvicorn"),
    "tensorboard": ("tensorboard",),
    "torch": ("torch",),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what was examined, whether it will do, what was found, and what to do if it will not."""

    what: str
    state: str
    found: str
    fix: str = ""


def _python(url: str | None) -> Iterator[Row]:
    version, (low, high) = sys.version_info[:2], PYTHONS
    state = OK if low <= version < high else FAIL
    fix = f"make an environment with Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}" if state == FAIL else ""
    yield Row("Python", state, f"{platform.python_version()} on {platform.system()}", fix)


def _packages(url: str | None) -> Iterator[Row]:
    try:
        wanted = importlib.metadata.requires("bottleneck-features") or []
    except importlib.metadata.PackageNotFoundError:
        yield Row("packages", NOTE, "used from a checkout, not installed", "make setup")
        wanted = []
    plain = [re.split(r"[ <>=!~;\[]", text)[0] for text in wanted if "extra ==" not in text]
    missing = [name for name in plain if name != "tensorflow" and not installed_version(name, "")]
    if missing:
        yield Row("packages", FAIL, f"missing: {', '.join(missing)}", f"python -m pip install {' '.join(missing)}")
    else:
        names = ("keras", "numpy", "h5py", "pillow")
        yield Row("packages", OK, ", ".join(f"{name} {installed_version(name)}" for name in names))
    there = [extra for extra, needed in EXTRAS.items() if all(installed_version(name, "") for name in needed)]
    absent = ", ".join(extra for extra in EXTRAS if extra not in there)
    found = f"{', '.join(there) or 'none'}{f'; not {absent}' if absent else ''}"
    fix = (
        f"if you need one, such as {absent.partition(',')[0]}: {how_to_install(absent.partition(',')[0])}"
        if absent
        else ""
    )
    yield Row("extras", NOTE if absent else OK, found, fix)


def _backend(url: str | None) -> Iterator[Row]:
    name = keras_backend()
    known = ("tensorflow", "jax", "torch")
    if "KERAS_BACKEND" in os.environ:
        where, way_out = "KERAS_BACKEND", "unset KERAS_BACKEND"
    else:
        where, way_out = f"backend in {keras_settings()}", "remove that file"
    if name not in known:
        yield Row(
            "backend", FAIL, f"{where} is {name!r}", f"set KERAS_BACKEND to one of {', '.join(known)}, or {way_out}"
        )
    elif importlib.util.find_spec(name) is None:
        yield Row("backend", FAIL, f"{name} is not installed", f"pip install {name}, or {way_out}")
    else:
        yield Row("backend", OK, f"Keras {installed_version('keras')} on {name} {installed_version(name)}")


def _gpu(url: str | None) -> Iterator[Row]:
    hidden = os.environ.get(VISIBLE, "0").strip() in ("", "-1")
    card, driver = os.path.exists(CARDS), DRIVER.exists()
    if not card and not driver:
        yield Row("GPU", OK, "none; the processors compute")
    elif not card:
        yield Row(
            "GPU",
            FAIL,
            "a driver without a card that this process may use",
            "start the container with --gpus all, or check nvidia-smi",
        )
    elif not driver:
        yield Row("GPU", FAIL, f"{CARDS}, and no driver", "install NVIDIA's driver; nvidia-smi must list the card")
    elif hidden:
        yield Row("GPU", FAIL, f"hidden: {VISIBLE} is {os.environ[VISIBLE]!r}", f"unset {VISIBLE}, or set it to 0")
    else:
        words = DRIVER.read_text().split()
        number = next((word for word in words if re.fullmatch(r"\d+\.\d+(\.\d+)?", word)), "unknown")
        libraries, command = CUDA.get(keras_backend(), ("", ""))
        if any((found.name or "").lower().startswith(libraries) for found in importlib.metadata.distributions()):
            yield Row("GPU", OK, f"driver {number}")
        else:  # those of the system may do
            fix = f"if it is not used: {command}"
            yield Row("GPU", NOTE, f"driver {number}, without the CUDA libraries of {keras_backend()}", fix)


def _threads(url: str | None) -> Iterator[Row]:
    for name in THREADS:
        if (value := os.environ.get(name)) is None:
            continue
        if not value.isdecimal() or not 0 < int(value) <= processors():
            yield Row(
                "threads",
                FAIL,
                f"{name} is {value!r}, of {processors()} processors",
                f"unset {name}, or set it to {processors()} or less",
            )
            return
    given = ", ".join(f"{name} {os.environ[name]}" for name in THREADS if name in os.environ)
    yield Row("threads", OK, f"{processors()} processors{f'; {given}' if given else ''}")


def _settings(url: str | None) -> Iterator[Row]:
    for name in SETTINGS:
        value = os.environ.get(name, "")
        whole = value if name == SETTINGS[0] else value.replace(".", "", 1)
        if value and not whole.isdecimal():
            yield Row("settings", FAIL, f"{name} is {value!r}", f"set {name} to a number, or unset it")


def _disk(url: str | None) -> Iterator[Row]:
    free = shutil.disk_usage(".").free
    state = OK if free >= LEAST_DISK else FAIL
    fix = (
        "free some space, or work in another folder: 2,000 images take about 10 MB of features" if state == FAIL else ""
    )
    yield Row("disk", state, f"{free / 1e9:.1f} GB free in {printable(os.getcwd())}", fix)


def _cache(url: str | None) -> Iterator[Row]:
    way_out = "set BOTTLENECK_CACHE to a folder that only you can write"
    try:
        folder = wanted_folder()
    except RuntimeError:
        yield Row("cache", FAIL, "there is no home folder", way_out)
        return
    if reason := foreign(folder):
        yield Row("cache", FAIL, f"{folder} is not used, because {reason}", way_out)
        return
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        yield Row("cache", FAIL, f"{place} is a file", f"move it away, or {way_out}")
        return
    try:
        probe = temporary_path(place / "doctor")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        ours = place.stat().st_uid == os.geteuid()
        fix = f"chmod u+rwx {shlex.quote(str(place))}, or {way_out}" if ours else way_out
        yield Row("cache", FAIL, f"{place} cannot be written ({error.strerror})", fix)
        return
    yield Row("cache", OK, str(folder))


def _weights(url: str | None) -> Iterator[Row]:
    from features.networks.backbones import BACKBONES
    from features.networks.weights import weights_here

    for name in USUAL_NETWORKS:
        try:
            file = weights_here(BACKBONES[name])
            yield Row(f"weights of {name}", OK, f"{file.path} ({file.route})")
        except WeightsNotFoundError:
            fix = "fetched by the first command, or give --weights FILE"
            yield Row(f"weights of {name}", NOTE, "in no cache of this machine", fix)
        except WeightsError as error:
            yield Row(f"weights of {name}", FAIL, str(error), "remove that file; the next command fetches it again")


def _remote(url: str | None) -> Iterator[Row]:
    if url is None:
        return
    from features.sources.objects import without_secrets

    name = without_secrets(url)
    try:
        found = _reached(url)
        fix = f"give the folder that holds the class folders, or a name that ends in {', '.join(_FILES)}"
        yield Row("remote", OK, f"{name}: {found}") if found else Row("remote", FAIL, f"{name}: no images", fix)
    except FileNotFoundError:
        yield Row("remote", FAIL, f"{name}: no such object", "check the spelling, and that the object is there")
    except BottleneckError as error:
        text = str(error).partition(". What is finished")[0]
        said, *way_out = re.split(r"\. |; (?![^(]*\))|: (?=pip )", text, maxsplit=1)
        yield Row("remote", FAIL, said, way_out[0] if way_out else "check the address, the network and the credentials")


def _reached(url: str) -> str:
    """Say what lies at an address; empty if nothing that is read."""
    from features.sources.archives import TAR_SUFFIXES
    from features.sources.blocks import matching, tables_below
    from features.sources.folders import IMAGE_SUFFIXES
    from features.sources.objects import Found
    from features.sources.remote import hosts_of, listing, store_of, tried

    url = re.sub(r"\{(\d+)\.\.\d+\}", r"\1", url)  # the first of several
    if "*" in url or "{}" in url:
        return f"{len(matching(url))} files"
    if url.startswith(("http://", "https://")) or url.lower().endswith((*_FILES, *TAR_SUFFIXES, *IMAGE_SUFFIXES)):
        store = store_of(url, hosts_of())
        found = tried(lambda: store.look(url), url)
        if found == Found():  # some servers answer nothing but GET
            found = tried(lambda: store.get(url), url)[1]
        return f"{found.size} bytes, {'with' if found.version else 'without'} a version"
    if images := len(listing(url)[0]):
        return f"{images} images"
    return tables_below(url.rstrip("/"))


CHECKS: tuple[Callable[[str | None], Iterator[Row]], ...] = (
    _python, _packages, _backend, _gpu, _threads, _settings, _disk, _cache, _weights, _remote,
)  # fmt: skip


def examine(url: str | None = None) -> dict[str, Any]:
    """Run all checks.

    Parameters
    ----------
    url : str, optional
        Address of a bucket or an object that must be reachable.

    Returns
    -------
    dict
        ``format``, ``checks`` (a list of rows), ``ok``: whether none failed.
    """
    rows = [row for check in CHECKS for row in check(url)]
    return {
        "format": 1,
        "checks": [dataclasses.asdict(row) for row in rows],
        "ok": all(row.state != FAIL for row in rows),
    }


def summary(document: dict[str, Any]) -> str:
    """Write the rows as a table, and the fixes below it."""
    rows = document["checks"]
    table = table_text([{"": row["what"], "state": row["state"], "found": printable(row["found"])} for row in rows])
    fixes = [f"{row['what']}: {row['fix']}" for row in rows if row["fix"]]
    return "\n".join([table, *(["", *fixes] if fixes else [])])

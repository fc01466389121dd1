"""Keras networks that come as files: ``.keras`` files, and folders of KerasHub, which it calls presets.

    FILE.keras --find_model_file()--> ModelFile
    preset:FOLDER --find_preset()--> Preset

Both have the name ``model`` in recipes and are recognised by their tensors and architecture. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from features.canonical import digest_of
from features.errors import ConfigurationError, brief
from features.files import HashedFile
from features.networks.backbones import MODEL_SUFFIX
from features.networks.backend import load_keras_hub
from features.networks.described import Described
from features.networks.descriptions import missing_description
from features.networks.imageinput import ImageInput, check_patches, read_json
from features.networks.kerashub import HubConfig, check_classes, converter_of
from features.networks.modelfile import ModelConfig, check_memory, load_model_file, open_model, reason_of, sized_model

PREFIX = "preset:"
_WEIGHTS = ("model.weights.h5", "model.weights.json")  # whole, or divided into several files


@dataclasses.dataclass(frozen=True)
class ModelFile(Described):
    """A ``.keras`` file, which contains both network and weights.

    Parameters
    ----------
    path : Path
        The file.
    given : str or None
        A pinned name on a hub; None for the path.
    """

    path: Path
    given: str | None = None

    @functools.cached_property
    def about(self) -> ModelConfig:
        """What the file says, read without Keras."""
        return ModelConfig(self.path)

    @property
    def classifier(self) -> tuple[str, str] | None:
        return self.about.classifier

    @property
    def default_size(self) -> tuple[int, int]:
        size = self.about.size
        if size is None and not self.about.is_layered:  # only the model itself knows
            shape = tuple(getattr(open_model(self.path), "input_shape", ()) or ())
            size = (shape[1], shape[2]) if len(shape) == 4 and None not in shape[1:3] else None
        if size is None:
            raise ConfigurationError(f"{self.path} accepts images of any size; choose one with --image-size")
        return size

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        return self.about.size

    @property
    def place(self) -> str | None:
        return self.given or super().place

    @property
    def own_prefix(self) -> int | None:
        return None if self.about.hub is None else self.about.hub.prefix_tokens

    @property
    def own_weights(self) -> Path | None:
        return self.path

    @functools.cached_property
    def image_input(self) -> ImageInput | None:
        """None for models made with Keras alone, which prepare RGB 0-255 themselves; networks of KerasHub never do."""
        hub = self.about.hub
        if hub is None:
            return None
        if hub.converter is None:
            raise ConfigurationError(missing_description(self.path, "the image converter of a task of KerasHub"))
        return hub.image_input(self.path, hub.converter)

    def build(self, size: tuple[int, int]) -> Any:
        return load_model_file(self.path, size)


@dataclasses.dataclass(frozen=True)
class Preset(Described):
    """A folder as KerasHub's ``save_to_preset`` writes it: configuration, weights and image converter.

    Parameters
    ----------
    folder : Path
        The folder.
    given : str
        ``preset:FOLDER`` with the absolute path, or a pinned name on a hub.
    """

    folder: Path
    given: str

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of ``config.json``."""
        return read_json(self.folder / "config.json")

    @functools.cached_property
    def hub(self) -> HubConfig:
        """What ``config.json`` says; ``ConfigurationError`` if it is not of KerasHub."""
        path = self.folder / "config.json"
        found = HubConfig.of(path, self.config)
        if found is None:
            received = brief(f"{self.config.get('class_name')} of {self.config.get('module')}", 100)
            raise ConfigurationError(f"{path}: received the class {received}, expected one of KerasHub")
        return found

    @functools.cached_property
    def image_input(self) -> ImageInput:
        """The image converter of the folder."""
        path = self.folder / "image_converter.json"
        if path.is_file():
            return self.hub.image_input(path, read_json(path))
        path = self.folder / "preprocessor.json"
        converter = converter_of(read_json(path)) if path.is_file() else None
        if converter is None:
            raise ConfigurationError(
                missing_description(self.folder, "image_converter.json and the image converter in preprocessor.json")
            )
        return self.hub.image_input(path, converter)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        return None if self.hub.takes_any_size else self.hub.size

    @property
    def own_prefix(self) -> int | None:
        return self.hub.prefix_tokens

    @property
    def own_weights(self) -> Path | None:
        return next((self.folder / name for name in _WEIGHTS if (self.folder / name).is_file()), None)

    @property
    def place(self) -> str | None:
        return self.given

    @property
    def card(self) -> Path:
        return self.folder

    @functools.cached_property
    def own_files(self) -> tuple[HashedFile, ...]:
        return tuple(map(HashedFile.of, (self.folder / "config.json", *self._weights_files())))

    def own_digest(self) -> str:
        """sha256 over the sha256 of ``config.json`` and of the files of the weights."""
        return digest_of([file.sha256 for file in self.own_files])

    def _weights_files(self) -> list[Path]:
        whole = self.own_weights or self.folder
        if whole.suffix != ".json":
            return [whole]
        places = read_json(whole).get("weight_map")
        names = {
            name for value in dict(places or {}).values() for name in (value if isinstance(value, list) else [value])
        }
        for name in names:
            if not isinstance(name, str) or name != Path(name).name or not (self.folder / name).is_file():
                raise ConfigurationError(
                    f"{whole}: names the file {brief(repr(name), 100)}, expected one in its folder"
                )
        return [whole, *(self.folder / name for name in sorted(names))]

    def build(self, size: tuple[int, int]) -> Any:
        import keras

        check_classes(self.folder / "config.json", self.config)
        if size != self.hub.size:  # its own need not be whole patches
            check_patches(self.folder / "config.json", self.hub.patch, size)
        load_keras_hub(self.folder)
        settings = {**self.hub.settings, "dtype": _float32(self.folder, self.hub.settings.get("dtype"))}
        if self.hub.takes_any_size and "image_shape" in settings:
            settings["image_shape"] = [*size, 3]
        config = {**self.config, "config": settings}
        files = self._weights_files()
        try:
            check_memory(self.folder, config, sum(path.stat().st_size for path in files))
            model = keras.saving.deserialize_keras_object(config, safe_mode=True)
            model.load_weights(str(files[0]))
        except ConfigurationError:
            raise
        except Exception as error:  # layers raise errors of any type while they are made
            raise ConfigurationError(
                f"{self.folder} cannot be loaded as a preset of KerasHub: {reason_of(error)}"
            ) from error
        return sized_model(self.folder, model, size)


def _float32(folder: Path, policy: Any) -> str:
    """Return the policy to compute in; weights kept in half precision are converted, quantised ones refused."""
    settings = policy.get("config") if isinstance(policy, Mapping) else None
    name = settings.get("name") if isinstance(settings, Mapping) else policy
    if name not in (None, "float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16"):
        raise ConfigurationError(
            f"{folder}: its weights have the dtype policy {brief(repr(name), 80)}, expected float32, bfloat16 or float16"
        )
    return "float32"


def find_model_file(name: str) -> ModelFile | None:
    """Find a ``.keras`` file by its path; None for another name."""
    path = Path(name).expanduser()
    if path.suffix.lower() != MODEL_SUFFIX or name.startswith(PREFIX):
        return None
    found = ModelFile("model", "none", None, path=path)
    return found if found.about else None  # or an error says what it is


def find_preset(name: str) -> Preset | None:
    """Find a preset by ``preset:FOLDER``, or by the folder itself if it holds one; None for another name."""
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    files = [folder / "config.json", *(folder / weights for weights in _WEIGHTS)]
    there = files[0].is_file() and (files[1].is_file() or files[2].is_file())
    found = Preset("model", "none", None, folder=folder, given=f"{PREFIX}{folder.resolve()}")
    if name.startswith(PREFIX):
        if there and found.hub:  # else an error says what it is
            return found
        what = "has no config.json with model.weights.h5" if folder.is_dir() else "is no folder"
        raise ConfigurationError(
            f"backbone: received {name!r}, but {folder} {what}. Expected preset:FOLDER with a folder that KerasHub's save_to_preset "
            "wrote or that was downloaded by hand (nothing is fetched from Kaggle); from a hub: hf:OWNER/NAME"
        )
    return found if there and HubConfig.of(files[0], found.config) is not None else None

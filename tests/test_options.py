"""Options are declared once: the command line and scikit-learn's constructor, which repeat them, say the same."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from helpers import recipe

from features import FeatureExtractor
from features.augmentation import PRESETS
from features.errors import ConfigurationError
from features.extraction.options import ExtractionOptions
from features.recipe import NetworkOptions, PixelRule
from pipeline.commands.features import extract
from pipeline.predicting.options import PredictOptions


def defaults(declared: Any) -> dict[str, Any]:
    return {name: item.default for name, item in inspect.signature(declared).parameters.items()}


def test_the_command_line_has_every_option_with_its_default() -> None:
    command = {"layers" if name == "layer" else name: value for name, value in defaults(extract).items()}
    for field in dataclasses.fields(ExtractionOptions):
        assert command[field.name] == (None if field.name == "layers" else field.default), field.name


def test_the_transformer_has_every_option_of_the_network_with_its_default() -> None:
    renamed = {"layer": "layers", "fit_rule": "fit"}
    given = {renamed.get(name, name): value for name, value in defaults(FeatureExtractor).items()}
    for field in dataclasses.fields(NetworkOptions):
        assert given[field.name] == (None if field.name == "layers" else field.default), field.name


def test_a_recipe_gives_the_options_that_ask_for_it() -> None:
    made = recipe("block5_pool", "none", dtype="float16", precision="bfloat16:keras-jax")
    made = dataclasses.replace(made, pixels=PixelRule(160, 192, resize="keras", fit="pad", decode="fast"))
    options = made.augmented(PRESETS["flip"], 7).options("vgg16", "vgg16.h5", device="cpu")
    assert options == NetworkOptions(
        "vgg16",
        "vgg16.h5",
        layers=("block5_pool",),
        pooling="none",
        image_size=(160, 192),
        resize="keras",
        fit="pad",
        dtype="float16",
        decode="fast",
        engine="keras",
        precision="bfloat16",
        device="cpu",
    )
    assert PixelRule.of(options, (224, 224)) == made.pixels
    assert made.options("vgg16", "imagenet", engine="auto").engine == "auto"
    assert recipe().options("vgg16", "imagenet").engine == "auto"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pooling": "average"}, "pooling: received 'average', expected one of none, avg"),
        ({"pooling": ""}, "pooling: received ''"),
        ({"resize": "bilinear"}, "resize: received 'bilinear'"),
        ({"fit": "strech"}, "fit: received 'strech'.*did you mean 'stretch'"),
        ({"dtype": "float64"}, "dtype: received 'float64'"),
        ({"decode": "quick"}, "decode: received 'quick'"),
        ({"layout": "flat"}, "layout: received 'flat', expected one of packed, sharded"),
        ({"split": "stratify"}, "split"),
        ({"batch_size": 0}, "batch size: received 0, expected 1 to 4096"),
        ({"shard_rows": 0}, "shard rows: received 0"),
        ({"workers": 0}, "workers: received 0"),
        ({"max_unreadable": 2}, "max unreadable: received 2, expected 0 to 1"),
        ({"check_precision": -1}, "check precision: received -1"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_read(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ExtractionOptions(**wrong)


def test_one_layer_may_be_given_by_its_name_and_one_number_is_a_square() -> None:
    assert NetworkOptions(layers="block5_pool") == NetworkOptions(layers=["block5_pool"])  # type: ignore[arg-type]
    assert PixelRule.of(NetworkOptions(image_size=96), (224, 224)) == PixelRule(96, 96)
    assert PixelRule.of(NetworkOptions(), (224, 192)) == PixelRule(224, 192)


def test_options_cannot_be_changed() -> None:
    for options in (NetworkOptions(), ExtractionOptions(), PredictOptions()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            options.device = "cpu"  # type: ignore[misc]

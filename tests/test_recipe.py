"""Recipes: one canonical text, one fingerprint. A changed digest here would cost every user their cache."""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers import recipe, rounds
from hypothesis import given, settings
from hypothesis import strategies as st

from features.augmentation import PRESETS, AugmentSpec
from features.canonical import canonical_json
from features.errors import ConfigurationError
from features.recipe import PixelRule, Recipe

EXAMPLE = Recipe(
    backbone="mobilenetv2",
    weights="ab" * 32,
    layer="out_relu",
    pooling="avg",
    pixels=PixelRule(224, 224),
    preprocessing="mobilenet_v2",
)


def test_canonical_text_is_frozen() -> None:
    assert EXAMPLE.canonical == (
        '{"augmentation":null,"backbone":"mobilenetv2","colour":"rgb:exif,alpha-over-white","decode":"full",'
        '"dtype":"float32","fit":"stretch","height":224,"layer":"out_relu","pooling":"avg","precision":"float32",'
        '"preprocessing":"mobilenet_v2","resize":"antialias","seed":0,"version":1,'
        '"weights":"' + "ab" * 32 + '","width":224}'
    )


def test_fingerprint_is_frozen() -> None:
    assert EXAMPLE.fingerprint == "cb73e8420d9cab42b0828848956b56e76400f9b400406df35256feb37b5cc07f"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", "vgg16"),
        ("weights", "cd" * 32),
        ("layer", "other"),
        ("pooling", "max"),
        ("pixels", PixelRule(160, 224)),
        ("pixels", PixelRule(224, 224, resize="keras")),
        ("pixels", PixelRule(224, 224, fit="crop")),
        ("preprocessing", "none"),
        ("augmentation", PRESETS["flip"]),
        ("seed", 1),
        ("dtype", "float16"),
    ],
)
def test_every_field_changes_the_fingerprint_and_is_named(field: str, value: object) -> None:
    changed = dataclasses.replace(EXAMPLE, **{field: value})
    assert changed.fingerprint != EXAMPLE.fingerprint
    named = set(EXAMPLE.difference(changed))
    assert named <= {field, "height", "resize", "fit"}
    assert len(named) == 1


DRAWN = EXAMPLE.augmented(PRESETS["crop-rotation-jitter"], 3)


def test_canonical_text_and_fingerprint_with_views_are_frozen() -> None:
    assert DRAWN.canonical == EXAMPLE.canonical.replace('"seed":0', '"seed":3').replace(
        '"augmentation":null',
        '"augmentation":{"brightness":0.2,"contrast":0.2,"crop_ratio":[0.75,1.3333333333333333],"crop_scale":[0.8,1.0],'
        '"fill":"constant","horizontal_flip":true,"hue":0.05,"rotation_degrees":15.0,"saturation":0.2,"shift":0.0,'
        '"version":1,"zoom":0.0}',
    )
    assert DRAWN.fingerprint == "96b58242df75b54002d8a91435b74d0feef2bf4442b93c6b573869769e06c3ee"


def test_view_0_is_one_cell_whatever_the_others_are_drawn_from() -> None:
    assert DRAWN.cell(0) == EXAMPLE.cell(0) == (EXAMPLE.fingerprint, 0)
    assert DRAWN.cell(2) == (DRAWN.fingerprint, 2)
    assert (DRAWN.plain, EXAMPLE.plain) == (EXAMPLE, EXAMPLE)
    others = [DRAWN, EXAMPLE.augmented(PRESETS["flip"], 3), EXAMPLE.augmented(PRESETS["crop-rotation-jitter"], 4)]
    assert len({item.cell(1) for item in others}) == len({*others}) == 3
    assert {item.cell(0) for item in others} == {EXAMPLE.cell(0)}


def test_a_specification_that_changes_nothing_is_none_and_has_no_seed() -> None:
    for spec in (None, PRESETS["none"], AugmentSpec(fill="nearest")):
        assert EXAMPLE.augmented(spec, 7).canonical == EXAMPLE.canonical
        assert DRAWN.augmented(spec, 7) == EXAMPLE


def test_two_augmentations_are_compared_field_by_field() -> None:
    assert DRAWN.difference(EXAMPLE.augmented(dataclasses.replace(PRESETS["crop-rotation-jitter"], hue=0.1), 3)) == {
        "augmentation.hue": (0.05, 0.1)
    }
    assert set(DRAWN.difference(EXAMPLE)) == {"augmentation", "seed"}


def test_a_stored_augmentation_is_checked() -> None:
    assert Recipe.from_dict(json.loads(DRAWN.canonical)) == DRAWN
    values = DRAWN.to_dict()
    for change, message in (
        ({"version": 2}, "augmentation: received version 2, expected 1; another release wrote it"),
        ({"hue": 3}, "hue: received 3, expected 0.0 to 0.5"),
        ({"tint": 1}, "no field 'tint'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Recipe.from_dict({**values, "augmentation": {**values["augmentation"], **change}})
    with pytest.raises(ConfigurationError, match="augmentation: received 'flip', which has the wrong type"):
        Recipe.from_dict({**values, "augmentation": "flip"})


def test_names_of_data_sets() -> None:
    assert EXAMPLE.name == "out_relu.avg"
    assert recipe("block5_pool", "none").name == "block5_pool"
    assert recipe("a/b", "max").name == "a|b.max"


def test_round_trip_and_refusals() -> None:
    assert Recipe.from_dict(EXAMPLE.to_dict()) == EXAMPLE
    with pytest.raises(ConfigurationError, match="received version 2, expected 1"):
        Recipe.from_dict({**EXAMPLE.to_dict(), "version": 2})
    with pytest.raises(ConfigurationError, match="colour_space"):
        Recipe.from_dict({**EXAMPLE.to_dict(), "colour_space": "rgb"})
    with pytest.raises(ConfigurationError, match="did you mean 'antialias'"):
        PixelRule(8, 8, resize="antialiased")
    with pytest.raises(ConfigurationError, match="received the height 0, expected 1 to 4096 pixels"):
        PixelRule(0, 8)


@pytest.mark.slow
@pytest.mark.stress
@settings(max_examples=rounds(200))
@given(
    st.dictionaries(
        st.text(),
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_canonical_json_does_not_depend_on_order(values: dict[str, object]) -> None:
    reordered = dict(sorted(values.items(), reverse=True))
    assert canonical_json(values) == canonical_json(reordered)

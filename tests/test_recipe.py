"""Recipes: one canonical text, one fingerprint. A changed digest here would cost every user their cache."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import recipe
from hypothesis import given
from hypothesis import strategies as st

from features.errors import ConfigurationError
from features.recipe import PixelRule, Recipe, canonical_json

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
        ("augmentation", {"flip": True}),
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


def test_names_of_data_sets() -> None:
    assert EXAMPLE.name == "out_relu.avg"
    assert recipe("block5_pool", "none").name == "block5_pool"
    assert recipe("a/b", "max").name == "a|b.max"


def test_round_trip_and_refusals() -> None:
    assert Recipe.from_dict(EXAMPLE.to_dict()) == EXAMPLE
    with pytest.raises(ConfigurationError, match="version 2"):
        Recipe.from_dict({**EXAMPLE.to_dict(), "version": 2})
    with pytest.raises(ConfigurationError, match="colour_space"):
        Recipe.from_dict({**EXAMPLE.to_dict(), "colour_space": "rgb"})
    with pytest.raises(ConfigurationError, match="did you mean 'antialias'"):
        PixelRule(8, 8, resize="antialiased")
    with pytest.raises(ConfigurationError, match="1 to 4096 pixels, received 0"):
        PixelRule(0, 8)


@given(
    st.dictionaries(
        st.text(),
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_canonical_json_does_not_depend_on_order(values: dict[str, object]) -> None:
    reordered = dict(sorted(values.items(), reverse=True))
    assert canonical_json(values) == canonical_json(reordered)

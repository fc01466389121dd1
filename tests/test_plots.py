"""Plots of a run: readable in one column, and told apart by people who see few colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.runs.plots import BLUE, DPI, EMPTY, INK, VERMILLION, ink_on, plot_run, shades

# Machado et al., A Physiologically-based Model for Simulation of Color Vision Deficiency, 2009, severity 1, linear RGB
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])


def linear(colour: np.ndarray) -> np.ndarray:
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def test_the_two_colours_stay_apart_without_red_or_green_cones() -> None:
    for seen in (np.eye(3), DEUTERANOPIA, PROTANOPIA):
        first, second = (np.clip(seen @ linear(rgb(colour)), 0, 1) for colour in (BLUE, VERMILLION))
        assert np.abs(first - second).max() > 0.2


def test_text_on_every_shade_can_be_read() -> None:
    for hits in range(0, 101, 5):
        colours = shades(np.array([[hits, 100 - hits], [50, 50]])).reshape(-1, 3)
        for colour in colours:
            text = rgb(INK) if ink_on(colour) == INK else np.ones(3)
            light, dark = sorted((linear(one) @ [0.2126, 0.7152, 0.0722] for one in (colour, text)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 3.9, (hits, colour)


def test_shades_are_blue_for_hits_and_orange_for_mistakes() -> None:
    found = shades(np.array([[9, 1, 0], [0, 4, 0], [0, 0, 0]]))
    np.testing.assert_allclose(found[1, 1], rgb(BLUE))
    np.testing.assert_allclose(found[0, 2], rgb(EMPTY))
    np.testing.assert_allclose(found[2, 2], rgb(EMPTY))
    expected = rgb(EMPTY) + 0.8 * np.sqrt(0.1) * (rgb(VERMILLION) - rgb(EMPTY))
    np.testing.assert_allclose(found[0, 1], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "inches"), [(2, 3.5), (17, 5.6), (200, 3.5)])
def test_plots_are_as_wide_as_a_column_or_a_page(tmp_path: Path, classes: int, inches: float) -> None:
    labels = np.arange(3 * classes, dtype=np.int32) % classes
    history = {
        "epoch": [1.0, 2.0, 3.0],
        "loss": [1.0, 0.5, 0.2],
        "val_loss": [1.0, 0.6, 0.7],
        "val_accuracy": [0.1, 0.2, 0.3],
    }
    names = [f"$class_{number}$ <b>" for number in range(classes)]
    plot_run(tmp_path / "plots", history, labels, np.eye(classes)[labels], names)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["confusion.png", "learning.png"]
    with Image.open(tmp_path / "plots" / "confusion.png") as image:
        assert image.size == (round(inches * DPI), round(inches * DPI))
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (
        np.abs(pixels - np.round(255 * rgb(BLUE))).max(axis=1) <= 1
    ).any()  # every image is right: the diagonal is blue
    with Image.open(tmp_path / "plots" / "learning.png") as image:
        assert image.width == round(3.5 * DPI)
        drawn = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in (BLUE, VERMILLION):
        assert (np.abs(drawn - np.round(255 * rgb(colour))).max(axis=1) <= 1).any()


@pytest.mark.slow
def test_a_head_without_epochs_has_no_curves(tmp_path: Path) -> None:
    plot_run(tmp_path / "plots", {"C": [1.0]}, np.array([0, 1]), np.eye(2), ("a", "b"))
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["confusion.png"]


@pytest.mark.slow
def test_so_many_classes_have_no_matrix(tmp_path: Path) -> None:
    count = 5000  # a table of 200 MB, and a picture of nothing
    names = tuple(map(str, range(count)))
    plot_run(tmp_path / "plots", {"C": [1.0]}, np.array([0, 1]), np.eye(2, count), names)
    assert not list((tmp_path / "plots").iterdir())

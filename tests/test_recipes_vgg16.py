"""Published recipes of VGG16 from their files, through the command line, shortened."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import STRESS
from kitchen import FLOWERS, VGG, assert_best_epoch_is_kept, cook, history, predicted
from photographs import CATS_DOGS

from features.store.reader import FeatureStore


@pytest.fixture(autouse=True)
def without_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling VGG16 would take longer than these few steps; the tests of fine-tuning train with XLA."""
    monkeypatch.setattr("pipeline.tuning.training.xla_of", lambda layers: False)


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.skipif(not STRESS, reason="only `make stress` does it")
@pytest.mark.usefixtures("without_plots")
def test_vgg16_flowers(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ("vgg16-flowers", assets / FLOWERS, "--out", tmp_path, "--image-size", 32, "--weights", assets / VGG)
    published, cached = cook(capsys, *typed, images=32).values()
    extracted = published["1 extract"]["document"]
    assert extracted["classes"] == {"colts_foot": 16, "daffodil": 16}  # of 17
    assert published["1 extract"]["made"] == cached["1 extract"]["made"]
    document = published["3 finetune"]["document"]
    # Of the first five layers three are convolutions: kernel and bias of ten more, and of three dense layers.
    assert (document["trainable_variables"], document["cut"]) == (2 * 10 + 2 * 3, "block2_conv1")
    assert_best_epoch_is_kept(published["3 finetune"])
    assert cached["2 train_head"]["cv_accuracy"] > 0.4
    store = FeatureStore.open(cached["1 extract"]["document"]["file"])
    validation = [store.images.paths[row] for row in store.rows("validation")]
    for line in (published["4 predict"], cached["3 predict"]):
        (row,) = predicted(line)
        assert row["file"] in validation
        assert (assets / FLOWERS / row["file"]).is_file()
        assert row["class"] in ("colts_foot", "daffodil")


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.usefixtures("without_plots")
def test_vgg16_three_ways(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    side, images = (2, 64) if STRESS else (1, 24)  # of the last feature map
    typed = ("vgg16-three-ways", assets / CATS_DOGS, "--out", tmp_path, "--image-size", 32 * side)
    three = [
        word for way in ("a-architecture-only", "b-bottleneck-features", "c-last-block") for word in ("--way", way)
    ]
    scratch, features, block = cook(capsys, *typed, "--weights", assets / VGG, *three, images=images).values()
    document = scratch["3 finetune"]["document"]
    assert (document["parity_gap"], document["cut"]) == (None, "pixels")
    assert (document["trainable_variables"], document["trainable_parameters"]) == (
        30,
        14_714_688 + side**2 * 512 * 256 + 513,
    )
    assert features["2 train_head"]["cv_accuracy"] >= (0.5 if STRESS else 0.1)  # of so few images it says little
    document = block["3 finetune"]["document"]
    assert document["start"] == features["2 train_head"]["made"] == block["2 train_head"]["made"]
    assert (document["cut"], document["parity_gap"] < 1e-4) == ("block4_pool", True)
    assert document["trainable_variables"] == 2 * 3 + 2 * 2
    (layers,) = cook(capsys, *typed, "--weights", "random", "--way", "d-fc-layer", images=images).values()
    document = layers["3 finetune"]["document"]
    assert (document["trainable_variables"], document["parity_gap"] < 1e-4) == (2 * 4 + 2 * 3, True)
    for line in (scratch["3 finetune"], block["3 finetune"], layers["3 finetune"]):
        assert_best_epoch_is_kept(line)
        assert history(line["document"]["run"])["epoch"] == [0, 1, 2]

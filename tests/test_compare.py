"""Networks compared on a sample: accuracy on the same folds, paired differences, measured speeds, and features that are kept."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import NumpyNetwork, as_engine, assert_rows_are_their_images, call_pipeline, paint, recipe
from PIL import Image

from features.errors import ConfigurationError, SourceError, WeightsError
from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.recipe import Recipe
from features.sources.scan import scan
from features.store.reader import FeatureStore
from pipeline.intervals import paired_interval, wilson_interval
from pipeline.reporting.comparison import _drawn
from pipeline.stages import compare as stage
from pipeline.stages.compare import compare, files_of_networks, summary


class Network(NumpyNetwork):
    """Sees only some channels of the mean colour: ``rgb`` is all of it; a channel that is not seen is zero."""

    engine_name = "keras"

    def __init__(self, channels: str) -> None:
        super().__init__([recipe(backbone=channels, size=8)])
        self.backbone_argument, self.mask = channels, np.array([name in channels for name in "rgb"], np.float32)

    def engine(self, recipes: Sequence[Recipe], *, batch_size: int, device: str) -> Any:
        infer = super().engine(recipes, batch_size=batch_size, device=device)

        def masked(batch: np.ndarray) -> Mapping[str, np.ndarray]:
            return {name: values * self.mask for name, values in infer(batch).items()}

        return as_engine(masked)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Network]:
    """Networks by name, each made when first asked for; ``nothing`` cannot be found and ``odd`` fails otherwise."""
    made: dict[str, Network] = {}

    def resolve(options: ExtractionOptions) -> Network:
        if options.backbone == "nothing":
            raise WeightsError("the weights of 'nothing' were not found")
        if options.backbone == "odd":
            raise KeyError("an error of a library")
        return made.setdefault(options.backbone, Network(options.backbone))

    monkeypatch.setattr(stage, "resolve_network", resolve)
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture is drawn and no head trained, where a test is about neither."""
    monkeypatch.setattr(stage, "draw_comparison", lambda document, path: path.write_bytes(b"a picture"))
    monkeypatch.setattr(stage, "cross_validate", lambda head, prepared, folds: np.eye(len(head.classes))[prepared.y])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three classes that differ in red, hardly in green and not in blue, 20 images each."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(("ant", "bee", "cow")):
        for index in range(20):
            red, green = 60 + 60 * number, 100 + 12 * number
            colour = np.array([red, green, 0]) + generator.integers(0, 20, 3)
            paint(tmp_path / "photos" / name / f"{index:02d}.png", colour.tolist())
    return tmp_path / "photos"


def compared(source: Path, *names: str, **options: Any) -> dict[str, Any]:
    return compare(source, names, **{"batch_size": 4, "stores": source.parent / "stores", "limit": 30, **options})


def by_name(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["network"]: one for one in document["networks"]}


# ------------------------------------------------------------------------------------------------------- values
@pytest.mark.slow
def test_accuracies_differences_and_the_choice(
    source: Path, networks: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red tells all classes apart, blue none; with red alone nothing is lost, and it is the faster of the two here."""
    speeds = {"rgb": 10.0, "r": 20.0, "b": 40.0}
    monkeypatch.setattr(stage._Meter, "images_per_second", None)
    monkeypatch.setattr(stage, "_measured", lambda sample, network, folder, asked: speeds[network.backbone_argument])
    monkeypatch.setattr(stage, "draw_comparison", lambda document, path: None)
    networks["r"] = Network("r")
    networks["r"].license = "mit"
    document = compared(source, "rgb", "nothing", "b", "r", "odd", "rgb", limit=60)
    found = by_name(document)
    n = document["scored"]
    assert (document["format"], document["images"], document["sample"], document["folds"]) == (1, 60, 60, 5)
    assert n == 60 - int((FeatureStore.open(found["r"]["store"]).images.splits == 2).sum()) < 60  # no test images
    assert [one["network"] for one in document["networks"]] == ["r", "rgb", "b"]
    assert (found["rgb"]["accuracy"], found["r"]["accuracy"]) == (1.0, 1.0)
    assert found["b"]["accuracy"] < 0.6
    assert found["b"]["accuracy_interval"] == wilson_interval(round(found["b"]["accuracy"] * n), n)
    lost = round((1 - found["b"]["accuracy"]) * n)
    assert found["b"]["difference"] == -lost / n
    assert found["b"]["difference_interval"] == paired_interval(0, lost, n)
    assert (found["r"]["difference_interval"], found["rgb"]["difference_interval"]) == (None, paired_interval(0, 0, n))
    assert {name: one["seconds"] for name, one in found.items()} == {"rgb": 6.0, "r": 3.0, "b": 1.5}
    assert (document["best"], document["chosen"]) == ("r", "r")
    assert document["failed"] == [
        {"network": "nothing", "reason": "the weights of 'nothing' were not found"},
        {"network": "odd", "reason": "KeyError: 'an error of a library'"},
    ]
    assert document["next"][:4] == ["bottleneck", "train-head", found["r"]["store"], "--head"]  # all images are there
    assert {name: one["license"] for name, one in found.items()} == {"rgb": None, "r": "mit", "b": None}
    text = summary(document)
    assert text.splitlines()[1].endswith("  licence")
    assert [line.endswith("  mit") for line in text.splitlines()[2:5]] == [True, False, False]
    assert f"{source}: {n} of 60 images, logistic in 5 folds" in text
    assert "these images do not tell apart r, rgb; * is the fastest of them" in text
    assert "  failed: nothing: the weights of 'nothing' were not found" in text
    assert next(line for line in text.splitlines() if line.startswith("  *")).split()[1:5] == [
        "r",
        "8x8",
        "3",
        "1.0000",
    ]


@pytest.mark.slow
def test_all_networks_are_scored_on_the_same_folds_that_keep_groups(
    tmp_path: Path, networks: dict[str, Network], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """A head that is right about the images of one group of six only."""
    rows = [[f"{number:02d}.png", "ab"[number // 12 % 2], f"g{number // 6}"] for number in range(48)]
    for number, (name, *_) in enumerate(rows):
        paint(tmp_path / name, (number, 7, 7))
    with (tmp_path / "all.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["path", "label", "group"], *rows])
    seen: list[tuple[list[int], list[int]]] = []

    def cross_validated(head: Any, prepared: Any, folds: int) -> np.ndarray:
        reds = np.rint(prepared.train.values[:, 0, 0] * prepared.std[0] + prepared.mean[0]).astype(int)
        seen.append((reds.tolist(), prepared.groups.tolist()))
        wrong = np.eye(2)[1 - prepared.y]
        first = reds // 6 == reds[0] // 6
        wrong[first] = np.eye(2)[prepared.y[first]]
        return wrong

    monkeypatch.setattr(stage, "cross_validate", cross_validated)
    document = compare(tmp_path / "all.csv", ["r", "rg"], limit=48, batch_size=4, stores=tmp_path / "stores")
    [(reds, groups), other] = seen
    assert other == (reds, groups)
    assert (
        len(set(groups))
        == len({red // 6 for red in reds})
        == len({(red // 6, group) for red, group in zip(reds, groups, strict=True)})
    )
    assert [one["accuracy"] for one in document["networks"]] == [6 / len(reds)] * 2


@pytest.mark.parametrize("shares", [(0.05, 0.05), (0.1, 0.03), (0.3, 0.1), (0.01, 0.01)])
def test_the_paired_interval_covers_the_difference(shares: tuple[float, float]) -> None:
    """Exactly, over all counts of 60 images: about 95 % of the time, as Agresti and Min found for their interval."""
    n, (p, q) = 60, shares
    covered = 0.0
    for gained, lost in itertools.product(range(n + 1), repeat=2):
        if gained + lost <= n:
            low, high = paired_interval(gained, lost, n)
            rest = n - gained - lost
            log = math.lgamma(n + 1) - math.lgamma(gained + 1) - math.lgamma(lost + 1) - math.lgamma(rest + 1)
            log += gained * math.log(p) + lost * math.log(q) + rest * math.log(1 - p - q)
            covered += math.exp(log) * (low <= p - q <= high)
    assert 0.94 < covered < 1


# ------------------------------------------------------------------------------------------- nothing is done twice
@pytest.mark.slow
def test_the_full_extraction_infers_only_the_rest(source: Path, networks: dict[str, Network], quick: None) -> None:
    document = compared(source, "rgb", seed=3, workers=2)
    store = document["networks"][0]["store"]
    assert document["next"] == [
        *("bottleneck", "extract", str(source), "--backbone", "rgb"),
        *("--seed", "3", "--batch-size", "4", "--workers", "2", "--out", store),
    ]
    assert (document["networks"][0]["inferred"], sum(networks["rgb"].batches)) == (30, 30)
    options = ExtractionOptions(backbone="rgb", seed=3, split="stratified:0.75,0.25")
    result = Extraction(scan(source), networks["rgb"], Path(store), options).run()  # type: ignore[arg-type]
    assert (result.inferred, len(result.store)) == (30, 60)

    before = Path(store).read_bytes()
    again = compared(source, "rgb", seed=3, workers=2)
    assert Path(store).read_bytes() == before  # with its own splits and all of its rows
    assert (again["networks"][0]["inferred"], sum(networks["rgb"].batches)) == (0, 60)
    assert again["networks"][0]["images_per_second"] == document["networks"][0]["images_per_second"]
    assert again["next"][1] == "train-head"


@pytest.mark.slow
def test_a_larger_sample_adds_images_and_a_smaller_one_loses_none(
    source: Path, networks: dict[str, Network], quick: None
) -> None:
    assert [compared(source, "r", limit=limit)["networks"][0]["inferred"] for limit in (12, 30, 12)] == [12, 18, 0]
    paint(source / "ant" / "00.png", (1, 2, 3), size=(9, 9))  # another image under its name
    document = compared(source, "r", limit=12)
    assert document["networks"][0]["inferred"] == 1
    assert len(FeatureStore.open(document["networks"][0]["store"])) == 30


@pytest.mark.slow
def test_exchanged_files_of_one_size_and_time_keep_their_own_features(
    source: Path, networks: dict[str, Network], quick: None
) -> None:
    one, other = source / "ant" / "00.bmp", source / "cow" / "00.bmp"
    for path, red in ((one, 1), (other, 250)):
        paint(path, (red, 2, 3))
        os.utime(path, ns=(10**18, 10**18))
    compared(source, "rgb", limit=60)
    one.rename(source / "aside")
    other.rename(one)
    (source / "aside").rename(other)
    document = compared(source, "rgb", limit=60)
    assert document["networks"][0]["inferred"] == 0  # both are known, under other names
    assert_rows_are_their_images(FeatureStore.open(document["networks"][0]["store"]), source)


@pytest.mark.slow
def test_a_network_without_a_description_is_given_one(
    source: Path, networks: dict[str, Network], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ExtractionOptions] = []
    resolve = stage.resolve_network
    monkeypatch.setattr(stage, "resolve_network", lambda options: (asked.append(options), resolve(options))[1])
    document = compared(source, "r", "g", preprocess={"g": "how.json"})
    assert [(options.backbone, options.preprocess) for options in asked] == [("r", None), ("g", "how.json")]
    assert ("--preprocess" in document["next"]) == (document["chosen"] == "g")
    words = compared(source, "g", preprocess={"g": "how.json"})["next"]
    assert words[words.index("--preprocess") + 1] == "how.json"


@pytest.mark.slow
def test_ctrl_c_and_again(source: Path, networks: dict[str, Network], quick: None) -> None:
    networks["g"] = Network("g")
    networks["g"].fail_after = 4
    with pytest.raises(KeyboardInterrupt):
        compared(source, "r", "g", workers=1, limit=60)
    document = compared(source, "r", "g", workers=1, limit=60)
    assert (sum(networks["r"].batches), sum(networks["g"].batches)) == (60, 60)
    assert by_name(document)["r"]["inferred"] == 0
    assert 0 < by_name(document)["g"]["inferred"] < 60


@pytest.mark.slow
def test_a_speed_that_was_not_noted_is_measured(source: Path, networks: dict[str, Network], quick: None) -> None:
    first = compared(source, "r")
    speeds = source.parent / "stores" / "speeds.json"
    assert list(json.loads(speeds.read_text())["images_per_second"].values()) == [
        first["networks"][0]["images_per_second"]
    ]
    for text in ("{", "[]", '{"format": 2, "images_per_second": {}}', '{"format": 1, "images_per_second": [1]}'):
        speeds.write_text(text)
        before = sum(networks["r"].batches)
        document = compared(source, "r")
        assert sum(networks["r"].batches) - before == 12  # three batches, of which the first is not counted
        assert document["networks"][0]["images_per_second"] > 0
    before = sum(networks["r"].batches)
    compared(source, "r")
    assert sum(networks["r"].batches) == before


# ------------------------------------------------------------------------------------------------------- bad input
def test_images_without_labels_or_with_too_few_are_refused(tmp_path: Path, networks: dict[str, Network]) -> None:
    paint(tmp_path / "flat" / "1.png", (1, 2, 3))
    with pytest.raises(SourceError, match="none of its images has a label, and networks are compared by"):
        compared(tmp_path / "flat", "r")
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(1 if (split, name) == ("train", "dog") else 9):
                paint(tmp_path / "split" / split / name / f"{number}.png", (number, len(name + split), len(split)))
    with pytest.raises(
        SourceError, match="outside the test split, 1 of its classes have two images among the 10 images"
    ):
        compared(tmp_path / "split", "r")
    assert not (tmp_path / "stores").exists()
    assert networks == {}


@pytest.mark.slow
def test_stores_of_images_in_another_place_are_left_alone(
    source: Path, networks: dict[str, Network], quick: None
) -> None:
    store = Path(compared(source, "r")["networks"][0]["store"])
    before = store.read_bytes()
    moved = source.rename(source.parent / "elsewhere")
    document = compared(moved, "r")
    assert "which lies elsewhere than" in document["failed"][0]["reason"]
    assert "--stores" in document["failed"][0]["reason"]
    assert (document["chosen"], document["out"], store.read_bytes() == before) == (None, None, True)
    assert "no network could be compared" in summary(document)


def test_names_and_weights_of_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a,b").mkdir()
    assert stage.names_in("mobilenetv2, vgg16,") == ["mobilenetv2", "vgg16"]
    assert stage.names_in("a,b") == ["a,b"]
    names = ["net", "net=1", "vgg16"]
    assert files_of_networks("--weights", ["net=1=f.h5", "vgg16=a=b.h5"], names) == {"net=1": "f.h5", "vgg16": "a=b.h5"}
    for wrong in ("vgg19=f.h5", "f.h5", "vgg16="):
        with pytest.raises(
            ConfigurationError, match=r"^--preprocess: .* expected NETWORK=FILE with one of the networks"
        ):
            files_of_networks("--preprocess", [wrong], names)


@pytest.mark.parametrize(("names", "code"), [("r,nothing", 0), ("nothing,odd", 1)])
def test_the_exit_code_is_1_only_if_all_fail(
    source: Path, networks: dict[str, Network], quick: None, names: str, code: int
) -> None:
    stores = source.parent / "stores"
    done = call_pipeline("compare", source, "--backbones", names, "--limit", 30, "--stores", stores, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, len(document["failed"])) == (code, 2 - len(document["networks"]))
    assert ("next: bottleneck extract" in done.stderr) == (code == 0)
    assert (stores / "compare.png").exists() == (code == 0)


# ------------------------------------------------------------------------------------------------------- the picture
@pytest.mark.slow
def test_labels_of_the_picture_cover_nothing(
    source: Path, networks: dict[str, Network], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "cross_validate", lambda head, prepared, folds: np.eye(len(head.classes))[prepared.y])
    document = compared(source, "r", "g", out=tmp_path / "wide.jpg")
    with Image.open(tmp_path / "wide.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (1400, 800))
    crowd = [("mobilenetv2", 0.95, 100), ("vgg16", 0.94, 900), ("resnet50", 0.955, 110), ("dinov2-small", 0.97, 1000)]
    document |= {
        "networks": [
            {"network": name, "accuracy": y, "accuracy_interval": [y - 0.02, y + 0.01], "seconds": x}
            for name, y, x in crowd
        ],
        "chosen": "resnet50",
    }
    figure = _drawn(document)
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "1 min",
        "2 min",
        "5 min",
        "10 min",
        "20 min",
        "30 min",
    ]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["mobilenetv2", "vgg16", "resnet50 *", "dinov2-small"]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)


# ------------------------------------------------------------------------------------------------------- real weights
@pytest.mark.slow
def test_real_networks_are_compared_and_the_best_is_extracted(assets: Path, tmp_path: Path) -> None:
    """Four kinds of flowers by a real network and an untrained one; the printed command adds the other images."""
    flowers = tmp_path / "flowers"
    for name in ("sunflower", "bluebell", "daisy", "iris"):
        (flowers / name).mkdir(parents=True)
        for path in sorted((assets / "images" / "flowers17" / name).glob("*.jpg"))[:14]:
            (flowers / name / path.name).symlink_to(path)
    real, random = "mobilenetv2-0.35", "mobilenetv2-0.5"
    weights = (
        "--weights",
        f"{real}={assets}/weights/mobilenet_v2_0.35_224_no_top.weights.h5",
        "--weights",
        f"{random}=random",
    )
    asked = (
        "compare",
        flowers,
        "--backbones",
        f"{real},{random},vgg16",
        "--weights",
        f"vgg16={tmp_path}/none.h5",
        *weights,
    )
    done = call_pipeline(
        *asked,
        "--limit",
        40,
        "--image-size",
        96,
        "--batch-size",
        8,
        "--engine",
        "keras",
        "--stores",
        tmp_path / "s",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    found = by_name(document)
    assert (document["best"], document["chosen"]) == (real, real)
    assert found[real]["accuracy"] > 0.8 > found[random]["accuracy"]
    assert found[random]["difference_interval"][1] < 0
    assert [one["network"] for one in document["failed"]] == ["vgg16"]
    assert "none.h5" in document["failed"][0]["reason"]
    extracted = call_pipeline(*document["next"][1:], "--json")
    assert extracted.returncode == 0, extracted.stderr
    said = json.loads(extracted.stdout)
    assert (said["rows"], said["inferred"], said["file"]) == (56, 16, found[real]["store"])

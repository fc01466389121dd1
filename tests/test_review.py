"""The review of labels without a browser: who may ask, what is written, what is shown, and what the head learns."""

from __future__ import annotations

import io
import itertools
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import paint
from PIL import Image
from reviewing import TEST, TRAIN, UNLABELLED, VALIDATION, Served, painted_store, two_classes, written_store

from features.errors import ConfigurationError, LabelsError, RequestError, SourceError, StoreError
from features.store.reader import FeatureStore
from pipeline.auditing.stage import audit
from pipeline.labels.file import append_decisions, forget_decisions, new_decision, read_labels
from pipeline.labels.overlay import with_labels
from pipeline.review import session as session_module
from pipeline.review.security import HEADERS
from pipeline.review.server import Review, listen
from pipeline.review.session import MOST_DECIDED, Query, Session

ROWS = 40
HOSTILE = '"><script>alert(1)</script>'


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """40 images: 24 for training, of which rows 0 and 1 are mislabelled; 8 for validation, 4 for test, 4 without a label."""
    truth, X = two_classes(ROWS)
    labels = truth.copy()
    labels[[0, 1]] = 1 - labels[[0, 1]]
    splits = np.repeat([TRAIN, VALIDATION, TEST, UNLABELLED], [24, 8, 4, 4])
    labels[splits == UNLABELLED] = -1
    return painted_store(tmp_path_factory.mktemp("review"), labels, splits, X)


@pytest.fixture
def served(store: FeatureStore, tmp_path: Path) -> Served:
    return Served(store, tmp_path / "labels.csv")


def effective(store: FeatureStore, path: Path) -> list[str]:
    """The class of every row under a labels file; empty for none."""
    laid = with_labels(store, path)
    return ["" if label < 0 else laid.classes[label] for label in laid.images.labels.tolist()]


# -- who may ask
def test_the_start_link_gives_a_cookie_for_the_page_alone_and_leads_to_it(served: Served) -> None:
    answer = served.ask(f"/start?token={served.keys.token}", cookie=None, sec_fetch_site="none")
    assert (answer.status, answer.headers["location"]) == (303, f"/{served.keys.place}/")
    cookie = answer.headers["set-cookie"]
    assert cookie == f"bottleneck-review={served.keys.cookie}; Path=/{served.keys.place}/; HttpOnly; SameSite=Strict"
    page = served.ask("", sec_fetch_site="none")
    assert page.status == 200
    assert served.keys.writing in page.body.decode()
    assert served.keys.token not in page.body.decode()
    for path in ("/start", "/start?token=", f"/start?token={served.keys.cookie}", "/"):
        assert served.ask(path).status == 403


REFUSED: list[tuple[dict[str, Any], int]] = [
    ({"host": "evil.example"}, 421),  # its name resolves to 127.0.0.1
    ({"host": "evil.example:8765"}, 421),
    ({"host": "127.0.0.1.evil.example:8765"}, 421),
    ({"host": ""}, 421),
    ({"host": None}, 421),
    ({"cookie": None}, 403),
    ({"cookie": "bottleneck-review=guess"}, 403),
    ({"sec_fetch_site": "cross-site"}, 403),  # a page on another origin
    ({"sec_fetch_site": "same-site"}, 403),  # a page on another port of 127.0.0.1, which has the same cookies
    ({"sec_fetch_site": "none"}, 403),
    ({"sec_fetch_site": None}, 403),
]


def test_other_pages_get_nothing(served: Served) -> None:
    paths = ("state", "order", "items?rows=0", "picture/0/small", "events", "detail/0", "decide")
    for (changes, status), path in itertools.product(REFUSED, paths):
        body = {"rows": [0], "value": "dog"} if path == "decide" else None
        answer = served.ask(path, body, **changes)
        assert (answer.status, len(answer.body) < 100) == (status, True), (changes, path)
        assert not served.session.path.exists()
        assert answer.headers.items() >= HEADERS.items()
        assert not [name for name in answer.headers if name.startswith("access-control")]


WRITES: list[tuple[dict[str, Any], int]] = [
    ({"x_review_token": None}, 403),
    ({"x_review_token": "guess"}, 403),
    ({"content_type": None}, 415),
    ({"content_type": "text/plain"}, 415),  # what a form or a simple request of another page can send
    ({"content_type": "application/x-www-form-urlencoded"}, 415),
    ({"content_type": "multipart/form-data; boundary=x"}, 415),
    ({"method": "PUT"}, 405),
    ({"method": "OPTIONS"}, 405),
]


def test_writes_need_the_token_of_the_page_and_json(served: Served) -> None:
    for changes, status in WRITES:
        answer = served.ask("decide", {"rows": [0], "value": "dog"}, **changes)
        assert answer.status == status, changes
        assert not served.session.path.exists()
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_every_answer_has_the_headers_that_keep_it_to_its_page(served: Served) -> None:
    paths = ["", "review.js", "review.css", "review.svg", "state", "picture/0/small", "picture/99999/small", "nothing"]
    for path in paths:
        answer = served.ask(path)
        assert answer.headers.items() >= HEADERS.items(), path
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_nothing_in_the_page_runs_but_its_one_script(served: Served) -> None:
    page = served.ask("").body.decode()
    assert page.count("<script") == 1
    assert '<script src="review.js" defer></script>' in page
    assert " style=" not in page
    assert " onclick" not in page
    assert "http" not in page.replace("<!doctype html>", "")
    assert "needs JavaScript" in page.split("<noscript>")[1].split("</noscript>")[0]
    script = served.ask("review.js").body.decode()
    assert not [
        word
        for word in ("innerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function")
        if word in script
    ]


@pytest.mark.parametrize(
    ("bound", "asked", "taken"),
    [
        ("127.0.0.1", "localhost:8765", True),
        ("127.0.0.1", "[::1]:8765", True),
        ("127.0.0.1", "192.168.1.5:8765", False),
        ("192.168.1.5", "192.168.1.5:8765", True),
        ("192.168.1.5", "rebound.example:8765", False),
        ("0.0.0.0", "10.1.2.3:8765", True),
        ("0.0.0.0", "rebound.example:8765", False),
    ],
)
def test_a_host_name_of_somebody_else_is_refused(
    store: FeatureStore, tmp_path: Path, bound: str, asked: str, taken: bool
) -> None:
    served = Served(store, tmp_path / "labels.csv", bound)
    assert (served.ask("review.css", host=asked).status == 200) is taken


# -- pictures
def test_a_picture_is_encoded_anew(served: Served) -> None:
    answer = served.ask("picture/3/small")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
    with Image.open(io.BytesIO(answer.body)) as image:
        assert (image.format, image.size) == ("JPEG", (256, 256))
        assert np.abs(np.asarray(image)[128, 128].astype(int) - [3, 0, 90]).max() < 6


def test_a_file_that_is_not_the_rows_gives_no_picture(tmp_path: Path) -> None:
    """A swapped link, and a forged store that names files of somebody's home."""
    truth, X = two_classes(6)
    made = painted_store(tmp_path, truth, np.zeros(6, int), X)
    home = tmp_path / "home"
    secret = paint(home / "secret.png", (200, 1, 1))
    (tmp_path / "photos" / "00002.png").unlink()
    (tmp_path / "photos" / "00002.png").symlink_to(secret)
    served = Served(made, tmp_path / "labels.csv")
    assert [served.ask(f"picture/{row}/small").status for row in range(4)] == [200, 200, 404, 200]
    for source, path in (
        (str(home), "secret.png"),
        (str(tmp_path / "photos"), "../home/secret.png"),
        ("/", str(secret)),
    ):
        forged = written_store(
            tmp_path / f"forged{len(path)}.h5", truth, np.zeros(6, int), X, names=("cat", "dog"), source=source,
            paths=(path, *made.images.paths[1:]), sha256=made.images.sha256,
        )  # fmt: skip
        if source != "/":  # which would list the whole machine
            assert Served(forged, tmp_path / "labels.csv").ask("picture/0/small").status == 404


def test_a_store_cannot_send_this_machine_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []
    monkeypatch.setattr("pipeline.reporting.thumbnails.scan", lambda source, **_: scanned.append(source) or 1 / 0)
    truth, X = two_classes(4)
    made = written_store(
        tmp_path / "f.h5", truth, np.zeros(4, int), X, names=("cat", "dog"), source="http://169.254.169.254/latest",
        paths=("a", "b", "c", "d"), sha256=np.arange(128, dtype=np.uint8).reshape(4, 32),
    )  # fmt: skip
    assert Served(made, tmp_path / "labels.csv").ask("picture/0/small").status == 404
    assert scanned == []


def test_addresses_of_a_manifest_are_asked_only_if_the_user_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("features.sources.remote.look_at_rows", lambda root, rows, hosts: asked.extend(rows) or 1 / 0)
    truth, X = two_classes(4)
    paint(tmp_path / "a.png", (9, 9, 9))
    paths = ("a.png", *(f"https://images.example.org/{name}.png" for name in "bcd"))
    (tmp_path / "m.csv").write_text("path,label\n" + "".join(f"{path},cat\n" for path in paths))
    made = written_store(
        tmp_path / "f.h5", truth, np.zeros(4, int), X, names=("cat", "dog"), source=str(tmp_path / "m.csv"),
        paths=paths, sha256=np.arange(128, dtype=np.uint8).reshape(4, 32),
    )  # fmt: skip
    served = Served(made, tmp_path / "labels.csv")
    assert [served.ask(f"picture/{row}/small").status for row in range(2)] == [404, 404]
    assert "--images" in served.ask("state").json["missing"]
    assert asked == []
    with pytest.raises(ZeroDivisionError):
        Served(made, tmp_path / "l.csv", images=(str(tmp_path / "m.csv"),)).ask("picture/1/small")
    assert asked == list(paths[1:])


def test_an_archive_that_has_gone_gives_no_picture(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(images: Any, row: int) -> bytes:
        raise SourceError("photos.zip: was removed")

    monkeypatch.setattr("features.sources.imageset.ImageSet.read", gone)
    assert served.ask("picture/0/small").status == 404


def test_only_rows_that_are_shown_have_a_picture(served: Served) -> None:
    for path in ("32/small", "-1/small", "x/small", "0/huge", f"{'9' * 30}/small"):
        assert served.ask(f"picture/{path}").status == 404, path
    assert served.ask("picture/36/small").status == 200


# -- decisions
def test_a_decision_is_in_the_file_before_it_is_called_saved(served: Served, store: FeatureStore) -> None:
    answer = served.ask("decide", {"rows": [0, 1], "value": "dog"}).json
    assert (answer["saved"], answer["rows"]) == (2, [0, 1])
    assert [item["state"] for item in answer["items"]] == ["kept", "changed"]
    found = read_labels(served.session.path).decisions
    assert [(one.path, one.value, one.earlier, one.by) for one in found] == [
        ("00000.png", "dog", "dog", "me"), ("00001.png", "dog", "cat", "me"),
    ]  # fmt: skip
    assert effective(store, served.session.path)[:3] == ["dog", "dog", "cat"]
    assert served.ask("decide", {"rows": [0], "value": ""}).json["items"][0]["label"] == "dog"


@pytest.mark.parametrize(
    ("value", "label", "state"),
    [("cat", "cat", "changed"), ("dog", "dog", "kept"), ("", "dog", "kept"), ("bird", "bird", "changed"),
     ("unknown", "", "unknown"), ("exclude", "", "excluded"), ("class:unknown", "unknown", "changed")],
)  # fmt: skip
def test_each_decision_and_taking_it_back(
    served: Served, store: FeatureStore, value: str, label: str, state: str
) -> None:
    before = served.session.items([3])
    decided = served.ask("decide", {"rows": [3], "value": value}).json
    assert [(item["label"], item["state"]) for item in decided["items"]] == [(label, state)]
    assert effective(store, served.session.path)[3] == label
    undone = served.ask("undo", {"batch": decided["batch"]}).json
    assert [{**item, "clock": 0} for item in undone["items"]] == before
    assert undone["items"][0]["clock"] == 2  # the page keeps the later of two answers
    assert effective(store, served.session.path)[3] == "dog"
    assert len(read_labels(served.session.path)) == 2  # undoing is a row as well
    assert served.ask("undo", {"batch": decided["batch"]}).status == 400


def test_a_decision_holds_for_all_rows_of_the_same_bytes(tmp_path: Path) -> None:
    truth, X = two_classes(4)
    sha256 = np.arange(128, dtype=np.uint8).reshape(4, 32)
    sha256[3] = sha256[0]
    made = written_store(
        tmp_path / "f.h5",
        truth,
        np.array([0, 0, 0, 2]),
        X,
        names=("cat", "dog"),
        source="",
        paths=tuple("abcd"),
        sha256=sha256,
    )
    served = Served(made, tmp_path / "labels.csv")
    answer = served.ask("decide", {"rows": [0], "value": "dog"}).json
    assert (answer["saved"], answer["rows"]) == (1, [0])  # row 3 is a test row, which is never shown
    assert effective(made, served.session.path) == ["dog", "dog", "cat", "dog"]


def test_taking_a_later_decision_back_leaves_the_earlier_one(served: Served, store: FeatureStore) -> None:
    """An image that a person found right is still decided about when a later slip is undone, also after a restart."""
    served.ask("decide", {"rows": [3], "value": ""})
    slip = served.ask("decide", {"rows": [3], "value": "cat"}).json
    again = Served(store, served.session.path)
    again.session.adopt(read_labels(served.session.path))
    for one in (served, again):
        undone = one.ask("undo", {"batch": slip["batch"]}).json
        assert [(item["label"], item["state"]) for item in undone["items"]] == [("dog", "kept")]
    assert read_labels(served.session.path).decisions[-1].value == "dog"


def test_undoing_that_could_not_be_written_can_be_tried_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, decisions: Any) -> None:
        raise StoreError(f"{path}: could not be written (No space left on device)")

    batch = served.ask("decide", {"rows": [0], "value": "cat"}).json["batch"]
    with monkeypatch.context() as patch:
        patch.setattr(session_module, "append_decisions", full)
        assert served.ask("undo", {"batch": batch}).status == 500
    assert served.ask("state").json["undo"] == [batch]
    assert served.ask("undo", {"batch": batch}).json["items"][0]["state"] == "open"


def test_decisions_that_were_forgotten_meanwhile_are_gone(served: Served, store: FeatureStore) -> None:
    path = served.session.path
    served.ask("decide", {"rows": [0, 1], "value": "cat"})
    forget_decisions(path, [store.images.sha256[0].tobytes().hex()])
    served.session.adopt(read_labels(path))
    assert served.session.counts()["states"]["open"] == ROWS - 4 - 1


def test_a_decision_that_cannot_be_written_changes_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, decisions: Any) -> None:
        raise StoreError(f"{path}: could not be written (No space left on device)")

    monkeypatch.setattr(session_module, "append_decisions", full)
    before = served.session.items([0, 1])
    answer = served.ask("decide", {"rows": [0], "value": "dog"})
    assert answer.status == 500
    assert "No space left" in answer.json["error"]
    assert served.session.items([0, 1]) == before
    assert served.session.counts()["states"]["open"] == ROWS - 4


ODD: list[tuple[str, Any]] = [
    ("decide", b"{"),
    ("decide", b"[" * 5000),
    ("decide", b'{"rows": [0], "value": "cat"' + b" " * 300_000 + b"}"),
    ("decide", {"rows": [0]}),
    ("decide", {"rows": [0], "value": "cat", "more": 1}),
    ("decide", {"rows": [], "value": "cat"}),
    ("decide", {"rows": [32], "value": "cat"}),  # a test row
    ("decide", {"rows": [-1], "value": "cat"}),
    ("decide", {"rows": [True], "value": "cat"}),
    ("decide", {"rows": ["0"], "value": "cat"}),
    ("decide", {"rows": [0] * (MOST_DECIDED + 1), "value": "cat"}),
    ("decide", {"rows": [0], "value": 3}),
    ("decide", {"rows": [0], "value": "x" * 101}),
    ("decide", {"rows": [0], "value": "a\nb"}),
    ("decide", {"rows": [0], "value": " cat"}),
    ("undo", {"batch": "all"}),
    ("undo", {"batch": ["0" * 32]}),
    ("undo", {"batch": []}),
]  # fmt: skip


def test_what_the_page_does_not_send_is_refused(served: Served) -> None:
    for path, body in ODD:
        answer = served.ask(path, body)
        assert answer.status == 400, body
        assert len(answer.json["error"]) < 400
        assert not served.session.path.exists()


def test_questions_that_make_no_sense_are_refused(served: Served) -> None:
    for path in (
        "order?by=size",
        "order?state=x",
        "order?near=x&by=similar",
        "order?by=similar",
        "order?what=1",
        "items?rows=",
        "items?rows=1,x",
        "items?rows=--5",
        "items?rows=32",
        "detail/32",
        f"items?rows={','.join('0' * 401)}",
    ):
        assert served.ask(path).status == 400, path


def test_two_tabs_and_another_program_lose_nothing(store: FeatureStore, tmp_path: Path) -> None:
    """Two servers on one file, each with several threads that decide at once, and a program that appends."""
    path = tmp_path / "labels.csv"
    first, second = Session(store, path, by="a"), Session(store, path, by="b")

    def decide(session: Session, rows: range) -> None:
        for row in rows:
            session.decide([row], "bird")

    threads = [
        threading.Thread(target=decide, args=job)
        for job in ((first, range(3)), (first, range(3, 6)), (second, range(6, 9)))
    ]
    for thread in threads:
        thread.start()
    append_decisions(path, [new_decision(store.images.sha256[20], "20", "exclude", by="c")])
    for thread in threads:
        thread.join()
    assert effective(store, path)[:9] == ["bird"] * 9
    for session in (first, second):
        session.adopt(read_labels(path))
        assert session.counts()["states"] == {"open": 26, "kept": 0, "changed": 9, "unknown": 0, "excluded": 1}
        assert {item["by"] for item in session.items(list(range(9)))} == {"a", "b"}


def test_an_old_look_at_the_file_does_not_undo_what_was_decided_since(store: FeatureStore, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    session = Session(store, path, by="a")
    session.decide([0], "bird")
    old = read_labels(path)
    session.decide([1], "bird")
    session.adopt(old)
    assert [item["label"] for item in session.items([0, 1])] == ["bird", "bird"]


@pytest.mark.slow
def test_opened_again_it_goes_on_where_it_was(store: FeatureStore, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    before = Session(store, path, by="me")
    before.decide([0], "cat")
    before.decide([1, 2], "unknown")
    again = Session(store, path, by="me")
    again.learner.look()
    for item, now in zip(before.items([0, 1, 2]), again.items([0, 1, 2]), strict=True):
        assert {**now, "clock": item["clock"]}.items() >= item.items()
    assert again.counts() == before.counts()
    last = again.describe()["undo"][-1]
    assert [item["state"] for item in again.undo(last)["items"]] == ["open"]
    curve = again.learner.summary()["curve"]
    assert [curve[0]["decisions"], curve[-1]["decisions"]] == [0, 3]
    assert len(curve) > 2


# -- orders
def rows_of(session: Session, **query: Any) -> list[int]:
    found: list[int] = session.order(Query(**query))["rows"]
    return found


def test_the_mislabelled_images_come_first_and_test_rows_never(served: Served) -> None:
    session = served.session
    session.learner.look()
    order = rows_of(session)
    assert set(order[:2]) == {0, 1}
    assert sorted(order) == [*range(32), *range(36, 40)]
    assert order[-4:] == [36, 37, 38, 39]  # without a label nothing is suspect
    (item,) = session.items([0])
    assert (item["label"], item["predicted"]) == ("dog", "cat")  # by a head that was not trained on it
    assert item["suspicion"] > 0.6
    detail = served.ask("detail/0").json
    assert (detail["unseen"], detail["probable"][0]["name"]) == (True, "cat")


@pytest.mark.slow
def test_the_order_is_by_the_score_of_the_audit(tmp_path: Path) -> None:
    truth, X = two_classes(400, seed=3)
    X[:, 0] *= 0.3
    labels, wrong = truth.copy(), np.random.default_rng(1).choice(320, 24, replace=False)
    labels[wrong] = 1 - labels[wrong]
    splits = np.repeat([TRAIN, VALIDATION], [320, 80])
    sha256 = np.arange(400 * 32).reshape(400, 32).astype(np.uint8)
    sha256[:, :8] = np.arange(400, dtype="<i8").view(np.uint8).reshape(400, 8)
    store = written_store(
        tmp_path / "f.h5", labels, splits, X, names=("cat", "dog"), source="photos",
        paths=tuple(f"{row:03d}.png" for row in range(400)), sha256=sha256,
    )  # fmt: skip
    session = Session(store, tmp_path / "labels.csv", by="me")
    session.learner.look()
    score = audit(store, checks=["suspect-label"])["suspect-label"].score
    shown = session.learner._scores.suspicion
    assert np.corrcoef(shown, score)[0, 1] > 0.98  # heads of other folds and penalties
    assert np.abs(shown - score).mean() < 0.02
    first = rows_of(session)[:24]
    assert len(set(first) & set(np.argsort(-score)[:24].tolist())) >= 22


@pytest.mark.slow
def test_rows_that_a_decision_has_made_test_rows_are_not_shown(tmp_path: Path) -> None:
    truth, X = two_classes(24)
    labels, splits = truth.copy(), np.full(24, TRAIN)
    labels[20], splits[20], splits[21] = -1, UNLABELLED, TEST  # the group of an unlabelled image is in the test split
    sha256 = np.zeros((24, 32), np.uint8)
    sha256[:, 0] = np.arange(24)
    store = written_store(
        tmp_path / "f.h5", labels, splits, X, names=("cat", "dog"), source="photos",
        paths=tuple(f"{row:03d}.png" for row in range(24)), sha256=sha256,
        groups=tuple("one" if row in (20, 21) else f"g{row}" for row in range(24)),
    )  # fmt: skip
    session = Session(store, tmp_path / "labels.csv", by="me")
    session.learner.look()
    assert 20 in rows_of(session)
    batch = session.decide([20], "cat")["batch"]
    session.learner.look()
    assert 20 not in rows_of(session)
    assert session.items([20, 19])[0]["row"] == 19
    assert session.describe()["hidden"] == 2
    with pytest.raises(RequestError, match="has become a row of the test split"):
        session.detail(20)
    session.undo(batch)
    session.learner.look()
    assert 20 in rows_of(session)


def test_filters_and_orders(served: Served) -> None:
    session = served.session
    session.learner.look()
    assert rows_of(session, by="file", split="validation") == [*range(24, 32)]
    assert rows_of(session, by="file", text="0003") == [3, 30, 31, 36, 37, 38, 39]
    assert rows_of(session, by="class", split="train")[:3] == [1, 2, 4]
    assert rows_of(session, by="file", label="dog", split="train")[:3] == [0, 3, 5]
    assert rows_of(session, by="file", predicted="cat")[:3] == [0, 2, 4]
    assert rows_of(session, by="similar", near=6)[0] == 6
    assert rows_of(session, by="similar", near=6)[1] % 2 == 0
    assert rows_of(session, label="no such class") == []
    session.decide([5], "")
    session.decide([7], "exclude")
    assert rows_of(session, by="file", state="decided") == [5, 7]
    assert rows_of(session, by="file", state="kept") == [5]
    assert len(rows_of(session, state="open")) == 34
    uncertain = rows_of(session, by="uncertainty")
    assert len(uncertain) == 36


# -- learning
@pytest.mark.slow
def test_corrections_raise_the_accuracy_and_the_page_is_told(tmp_path: Path) -> None:
    """300 rows, a third of the training labels wrong in one direction; a person who corrects them all."""
    generator = np.random.default_rng(1)
    truth, X = two_classes(300, columns=5)
    X[:, 0] -= 5.5 * truth  # the classes overlap
    splits = np.where(np.arange(300) < 200, TRAIN, VALIDATION)
    labels = truth.copy()
    wrong = np.flatnonzero((splits == TRAIN) & (truth == 1) & (generator.random(300) < 0.7))
    labels[wrong] = 0
    sha256 = generator.integers(0, 256, (300, 32), np.uint8)
    made = written_store(
        tmp_path / "f.h5",
        labels,
        splits,
        X,
        names=("cat", "dog"),
        source="",
        paths=tuple(map(str, range(300))),
        sha256=sha256,
    )
    served = Served(made, tmp_path / "labels.csv")
    learner = served.session.learner
    learner.look()
    first = learner.summary()
    served.session.decide(wrong.tolist(), "dog")
    learner.look()
    found = learner.summary()
    for name in ("original", "corrected"):  # no validation label was touched
        assert found[name]["n"] == 100
        assert found[name]["before"] == first[name]["after"]
        assert found[name]["after"] > found[name]["before"] + 0.1
        assert found[name]["interval"][0] > 0
        assert found[name]["gained"] - found[name]["lost"] == round(
            100 * (found[name]["after"] - found[name]["before"])
        )
    assert [point["decisions"] for point in found["curve"]] == [0, len(wrong)]
    assert 0 < found["flipped"] <= 300 - len(wrong)
    assert set(found["flips"]).isdisjoint(wrong.tolist())
    learned = [value for name, value in served.told if name == "learning"]
    assert [one["status"] for one in learned[-3:]] == ["learning", "ready", "ready"]
    assert (learned[-2]["trained"], learned[-1]["ranked"]) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [np.full(6, -1), np.zeros(6, int), np.array([0, 0, 0, 0, 0, 1])])
def test_too_few_labels_are_said_and_nothing_fails(tmp_path: Path, labels: np.ndarray) -> None:
    _, X = two_classes(6)
    splits = np.where(labels < 0, UNLABELLED, TRAIN)
    sha256 = np.arange(192, dtype=np.uint8).reshape(6, 32)
    made = written_store(
        tmp_path / "f.h5", labels, splits, X, names=("cat", "dog"), source="", paths=tuple("abcdef"), sha256=sha256
    )
    served = Served(made, tmp_path / "labels.csv")
    session = served.session
    session.learner.look()
    said = session.learner.summary()
    few = len(set(labels.tolist())) < 2
    assert said["status"] == ("impossible" if few else "ready")
    assert ("fewer than two classes" in said["message"]) is few
    assert rows_of(session) if few else sorted(rows_of(session)) == [0, 1, 2, 3, 4, 5]
    assert served.ask("state").json["missing"] != ""
    session.decide([0, 1, 2], "cat")
    session.decide([3, 4, 5], "dog")
    session.learner.look()
    assert session.learner.summary()["status"] == "ready"


# -- bad starts
def test_a_port_in_use_and_an_address_of_another_machine_are_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"--port {port}: another program listens.*--port 0"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigurationError, match="expected an address of this machine"):
        listen("203.0.113.7", 0)
    with pytest.raises(ConfigurationError, match="received 70000"):
        listen("127.0.0.1", 70000)


def test_labels_of_other_images_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    append_decisions(path, [new_decision("ab" * 32, "x.png", "cat", by="me")])
    with pytest.raises(LabelsError, match=r"labels\.csv"):
        Review(store, path, images=[], port=0)
    path.write_text("sha256,label\n")
    with pytest.raises(LabelsError, match="first line"):
        Review(store, path, images=[], port=0)


def test_without_the_extra_it_says_how_to_install_it(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigurationError, match=r"pip install .*\[review\]"):
        Review(store, tmp_path / "labels.csv", images=[], port=0)


def test_hostile_names_reach_the_page_as_data(tmp_path: Path) -> None:
    truth, X = two_classes(4)
    made = written_store(
        tmp_path / "f.h5", truth, np.zeros(4, int), X, names=(HOSTILE, "dog"), source="", paths=(HOSTILE, "b", "c", "d"),
        sha256=np.arange(128, dtype=np.uint8).reshape(4, 32),
    )  # fmt: skip
    served = Served(made, tmp_path / "labels.csv")
    answer = served.ask("items?rows=0")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["items"][0]["label"] == HOSTILE
    assert HOSTILE not in served.ask("").body.decode()

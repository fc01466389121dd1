"""Extraction and sweeps by workers that are processes of their own: the same store, whatever happens to them."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clusters import PRELOAD, WIDTH, Faults, Processes, Traffic, extract, extraction, processes, wrong_clock
from faults import differences, finish, inferred, start
from helpers import leave, listing, paint_folder, recipe

from features.errors import ClusterError, ConfigurationError, IntegrityError, StoreError
from features.extraction.journal import PartsFolder
from features.extraction.running import MadeShard, Reconciliation
from features.extraction.shard import KILLS_WORKER, ShardRecord, ShardSpec, extract_shard
from features.files import atomic_file, file_digest
from features.store.reader import FeatureStore, parts_folder
from features.temporary import system_folder
from pipeline.cluster import connection
from pipeline.cluster import run as module
from pipeline.cluster import worker as cluster_worker
from pipeline.cluster.connection import check_workers, connected, parse_cluster, shares
from pipeline.cluster.model import Costs, Worker, forecast_cluster
from pipeline.cluster.plan import OpenPlan, PlanFile, Setting, ShardTask, versions
from pipeline.cluster.plan import differences as version_differences
from pipeline.cluster.run import ClusterShards

SHARD = 32
SETTING = Setting("mobilenetv2", "imagenet", "auto", "auto", 32, None)


def spec(count: int = 10, start: int = 0) -> ShardSpec:
    paths = tuple(f"cat/{number:04d}\udcff.png" for number in range(start, start + count))
    return ShardSpec("/images", paths, tuple(range(count)), tuple(range(10**18, 10**18 + count)), (recipe(),), (0, 1))


# ------------------------------------------------------------------------------------------ without a cluster
def test_what_is_no_cluster_is_refused_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (parse_cluster("local:3"), parse_cluster("tls://a.b:1")) == (3, "tls://a.b:1")
    for text in ("", "local", "local:0", "local:-1", "local:257", "node1:8786", "tcp://node1", "http://node1:8786"):
        with pytest.raises(ConfigurationError, match=r"expected local:N .* such as tcp://node1:8786"):
            parse_cluster(text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"needs Dask: pip install .*\[cluster\]"):
        parse_cluster("local:2")


def test_processors_are_divided_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 4, 6})
    assert shares(1) == [[0, 2, 4, 6]]
    assert shares(2) == [[0, 2], [4, 6]]
    assert shares(3) == [[0], [2], [4, 6]]
    assert [len(share) for share in shares(8)] == [1] * 8


def test_a_plan_file_gives_back_every_spec_and_is_removed(tmp_path: Path) -> None:
    specs = [spec(), spec(5, start=100)]
    with PlanFile.written(tmp_path, specs, SETTING) as plan:
        assert listing(tmp_path) == [plan.path.name]
        opened = OpenPlan.open(plan.path, plan.token)
        assert opened.setting == SETTING
        for one, (offset, length) in zip(specs, plan.places, strict=True):
            task = ShardTask(str(plan.path), plan.token, offset, length, 0, len(one), "key")
            assert (opened.spec(task), opened.spec(task).identity) == (one, one.identity)
            part = opened.spec(dataclasses.replace(task, start=2, stop=4))
            assert (part.paths, part.sizes, part.views) == (one.paths[2:4], one.sizes[2:4], one.views)
        with pytest.raises(ClusterError, match="is not the plan file that was written"):
            OpenPlan.open(plan.path, "0" * 16)
    assert listing(tmp_path) == []
    parts = PartsFolder(tmp_path)  # that of a killed run goes when the next one begins
    (tmp_path / ".plan-0123.tmp").touch()
    parts.read()
    parts.open()
    assert listing(tmp_path) == ["manifest.jsonl"]


def test_versions_that_decide_numbers_are_compared() -> None:
    mine = {"keras": "3.15.1", "openvino": "2026.0", "tensorflow": "2.21.0", "feature format": "1"}
    assert version_differences(mine, mine) == []
    assert version_differences(mine, {**mine, "openvino": "not installed"}) == []
    theirs = {**mine, "keras": "3.12.0", "openvino": "2025.1", "feature format": "2"}
    assert version_differences(mine, theirs) == [
        "feature format 2 instead of 1",
        "keras 3.12.0 instead of 3.15.1",
        "openvino 2025.1 instead of 2026.0",
    ]


def test_versions_of_what_runs_onnx_files_and_presets_are_compared() -> None:
    mine = versions()
    assert {"onnxruntime", "keras-hub"} <= {*mine}
    assert version_differences(mine, {**mine, "onnxruntime": "not installed"}) == []
    assert version_differences({**mine, "onnxruntime": "2"}, {**mine, "onnxruntime": "1"}) == [
        "onnxruntime 1 instead of 2"
    ]


def test_every_planned_row_comes_once_or_is_named(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"cat": 40})
    work = extraction(source, tmp_path / "f.h5")
    plan = work.plan()
    work.parts.open()
    made = {item.planned.identity: item for item in work.run_shards(work._work(plan), lambda _: None)}
    first, second = plan.specs
    stores = {key: FeatureStore.open_shard(work.parts.path / f"{key}.h5") for key in made}
    check = Reconciliation(plan.specs)
    assert check.enter(made[first.identity], stores[first.identity])
    assert not check.enter(made[first.identity], stores[first.identity])  # the same shard made twice is one
    named = ", ".join(second.paths[:5])
    with pytest.raises(
        IntegrityError, match=rf"8 planned rows are in no shard: {named} and others\. The finished shards are kept"
    ):
        check.finish()
    foreign = MadeShard(first, made[second.identity].record, "")
    with pytest.raises(IntegrityError, match=r"was not planned to hold cat/0032.png"):
        Reconciliation(plan.specs).enter(foreign, stores[second.identity])
    part = MadeShard(plan.specs[0], ShardRecord(second.identity, "", (0,)), "")
    columns = {name: (*getattr(first, name), *getattr(second, name)) for name in ("paths", "sizes", "mtimes_ns")}
    whole = dataclasses.replace(first, **columns)
    both = Reconciliation([whole])
    assert both.enter(MadeShard(whole, part.record, ""), stores[second.identity])
    with pytest.raises(IntegrityError, match=r"32 planned rows are in no shard: cat/0000.png"):
        both.finish()
    assert both.enter(MadeShard(whole, made[first.identity].record, ""), stores[first.identity])
    both.finish()
    other = dataclasses.replace(first, views=(0, 1))
    with pytest.raises(IntegrityError, match="was not planned to hold other feature sets or views"):
        Reconciliation([other]).enter(MadeShard(other, made[first.identity].record, ""), stores[first.identity])


def test_of_two_writers_of_a_shard_the_first_one_counts(tmp_path: Path) -> None:
    """As where a worker that was taken for lost, or stuck, comes to its end after all; a damaged shard is no shard."""
    source = paint_folder(tmp_path / "images", {"cat": 3})
    work = extraction(source, tmp_path / "f.h5")
    (one,) = work.plan().specs
    folder = tmp_path / "shards"
    folder.mkdir()

    def write(value: float) -> tuple[ShardRecord, float]:
        with ThreadPoolExecutor(1) as pool:
            record = extract_shard(
                one,
                folder,
                read=lambda path: (source / path).read_bytes(),
                infer=lambda batch: {"last.avg": np.full((len(batch), WIDTH), value, np.float32)},
                decoders=pool,
                batch_size=4,
            )
        (name,) = listing(folder)
        assert record.sha256 == file_digest(folder / name)
        return record, float(FeatureStore.open_shard(folder / name).array().max())

    first = write(1)
    assert write(2) == first == (first[0], 1)
    path = folder / f"{one.identity}.h5"
    path.write_bytes(path.read_bytes()[:-100])
    assert write(3)[1] == 3
    with atomic_file(tmp_path / "a", once=True) as temporary:  # the other was quicker by a moment
        temporary.write_text("second")
        (tmp_path / "a").write_text("first")
    assert ((tmp_path / "a").read_text(), temporary.exists()) == ("first", False)


def test_the_model_counts_turns_losses_links_and_assembly() -> None:
    worker = Worker(decode_seconds=0.002, network_seconds=0.008, processors=2)
    assert worker.images_per_second == pytest.approx(200)
    assert dataclasses.replace(worker, separate_device=True).images_per_second == pytest.approx(125)
    plain = {"shard_seconds": 0.0, "start_seconds": 0.0, "assembly_bytes_per_second": math.inf, "planning_seconds": 0.0}

    def seconds(images: int, workers: int, **options: float) -> float:
        costs = Costs(shard_rows=1000, **{**plain, **options})  # type: ignore[arg-type]
        return forecast_cluster(images, workers, worker, costs).seconds

    assert seconds(3000, 1) == pytest.approx(15)
    assert seconds(3000, 2) == pytest.approx(10)  # two shards one after the other on one of them
    assert seconds(3000, 3) == seconds(3000, 9) == pytest.approx(5)
    assert seconds(2100, 2) == pytest.approx(5.5)  # the last shard is short
    assert seconds(3000, 1, shard_seconds=0.5) == pytest.approx(16.5)
    assert seconds(3000, 1, losses_per_hour=36, restart_seconds=7.5) == pytest.approx(15 * 1.1)
    assert seconds(3000, 3, image_bytes=10**6, link_bytes_per_second=1e8) == pytest.approx(30)
    costs = Costs(row_bytes=4000, start_seconds=7, assembly_bytes_per_second=1e9)
    whole = forecast_cluster(10**6, 10, worker, costs)
    assert (whole.start, whole.planning, whole.assembly, whole.disk_bytes) == (7, 20, 4, 8 * 10**9)
    assert whole.memory_bytes == 70_000_000 + 1300 * 10**6
    assert whole.seconds == pytest.approx(7 + 20 + 4 + 49 * (2048 / 200 + 0.1))
    with pytest.raises(ConfigurationError, match="0 workers"):
        seconds(10, 0)


# ------------------------------------------------------------------------------------------------- with workers
@pytest.fixture
def source(tmp_path: Path) -> Path:
    return paint_folder(tmp_path / "images", {"cat": 140, "dog": 160})


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    import dask
    import distributed  # noqa: F401  # its own settings first, else they would go with ours

    found = Faults(tmp_path / "faults.json", numpy=WIDTH, log=str(tmp_path / "log"))
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    # Dask read its part of the environment when it was imported, perhaps by another test.
    with dask.config.set({"distributed.worker.preload": [found.environment[PRELOAD]]}):
        yield found


@pytest.fixture
def cluster(tmp_path: Path, faults: Faults) -> Iterator[Processes]:
    with processes(tmp_path / "processes", faults.environment) as found:
        yield found


@pytest.mark.slow
def test_one_two_and_three_workers_make_the_local_store(
    source: Path, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "cat" / "0007.png").write_bytes(b"no image")
    extract(source, tmp_path / "local" / "f.h5")
    sharded = extract(source, tmp_path / "index" / "f.h5", layout="sharded").store
    told: list[int] = []
    caplog.clear()
    for count, clock in ((1, 0), (2, -86400 * 365), (3, 7200)):
        faults.set(numpy=WIDTH, log=str(tmp_path / f"log{count}"))
        for name, value in wrong_clock(tmp_path, clock).items():
            monkeypatch.setenv(name, value)
        out = tmp_path / f"by{count}" / "f.h5"
        options = {"layout": "sharded"} if count == 3 else {}
        runner = ClusterShards(f"local:{count}")
        result = extraction(source, out, runner, workers=1, **options).run(
            lambda stage, done, total: told.append(done) if stage == "extract" else None
        )
        assert (result.inferred, inferred(tmp_path / f"log{count}"), told[-1]) == (299, 299, 300)
        assert result.store.quarantine.reasons == ("not-an-image",)
        if count == 3:
            shards = {path.name for path in parts_folder(out).iterdir()}
            assert shards == {path.name for path in parts_folder(sharded.path).iterdir()}
            np.testing.assert_array_equal(result.store.array()[:], sharded.array()[:])
            assert listing(out.parent) == listing(sharded.path.parent)
        else:
            assert differences(tmp_path / "local" / "f.h5", out) == []
            assert listing(out.parent) == ["f.h5"]
        assert (tmp_path / "skewed").exists()
    assert caplog.text.count("cat/0007.png is unreadable (not-an-image); quarantined") == 3
    monkeypatch.setattr(module, "connected", None)  # nothing to do: no worker is asked
    assert not extraction(source, tmp_path / "by1" / "f.h5", ClusterShards("local:1")).run().written


@pytest.mark.slow
def test_messages_of_a_shard_are_small(tmp_path: Path, faults: Faults) -> None:
    """The difference between 4 and 24 shards, so that start-up does not count."""
    few = paint_folder(tmp_path / "few", {"cat": 40, "dog": 40})
    many = paint_folder(tmp_path / "many", {"cat": 240, "dog": 240})
    traffic, counts = Traffic(), []
    try:
        for source in (few, many):
            traffic.bytes = 0
            extract(source, tmp_path / f"{source.name}.h5", ClusterShards("local:1"), shard_rows=20)
            counts.append(traffic.bytes)
    finally:
        traffic.stop()
    each = (counts[1] - counts[0]) / 20
    print(f"{each:.0f} bytes for each shard")
    assert 500 < each < 10_000


@pytest.mark.slow
def test_a_poisonous_image_is_found_named_and_set_aside(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    """On one worker, where the image behind it waits each time that the worker dies, and is not to be blamed for it."""
    source = paint_folder(tmp_path / "images", {"cat": 6, "dog": 10})
    extract(source, tmp_path / "local.h5")
    faults.set(numpy=WIDTH, poison="cat/0004", die_once=str(tmp_path / "died"), log=str(tmp_path / "log"))
    out = tmp_path / "out" / "f.h5"
    store = extract(source, out, ClusterShards("local:1"), shard_rows=4, max_unreadable=1.0).store
    assert (store.quarantine.paths, store.quarantine.reasons) == (("cat/0004.png",), (KILLS_WORKER,))
    assert "cat/0004.png kills each worker that reads it; quarantined" in caplog.text
    assert "a shard of 4 images (cat/0004.png to dog/0001.png) has killed its workers" in caplog.text
    whole = FeatureStore.open(tmp_path / "local.h5")
    rows = [row for row, path in enumerate(whole.images.paths) if path != "cat/0004.png"]
    assert store.images.paths == tuple(whole.images.paths[row] for row in rows)
    np.testing.assert_array_equal(store.array(), whole.array()[rows])
    assert listing(out.parent) == ["f.h5"]
    # The worker also wrote a shard and died before it could say so: nothing was inferred again for it.
    assert (tmp_path / "died").exists()
    assert inferred(tmp_path / "log") == 15
    again = extraction(source, out, ClusterShards("local:1"), max_unreadable=1.0)
    assert not again.plan().specs  # it is remembered, and kills no more
    assert len(extraction(source, out, rehash=True).plan().specs) == 1  # unless asked to


@pytest.mark.slow
def test_a_record_that_is_lost_with_its_worker_is_asked_for_again(tmp_path: Path) -> None:
    """Dask makes a task again when the worker that held its result dies, and that may fail: here, by killing too."""
    from distributed.scheduler import KilledWorker

    source = paint_folder(tmp_path / "images", {"cat": 4})
    work = extraction(source, tmp_path / "f.h5")
    run = module._Run(ClusterShards("local:1"), None, None, work._work(work.plan()), lambda _: None)  # type: ignore
    for status, pieces in (("pending", [4]), ("error", [1] * 4)):
        problem = KilledWorker("key", SimpleNamespace(address="tcp://a:1"), 2)  # type: ignore[arg-type]
        future = SimpleNamespace(status="finished", exception=lambda problem=problem: problem)

        def result(timeout: float, status: str = status, future: Any = future, problem: Exception = problem) -> None:
            future.status = status
            raise problem if status == "error" else TimeoutError

        future.result = result
        piece = run._waiting.popleft()
        run._flying["key"] = module._Flight(piece, future)
        assert run._outcome("key") is None
        assert [len(piece) for piece in run._waiting] == pieces


@pytest.mark.slow
def test_a_worker_that_is_stuck_is_noticed_and_what_a_killed_command_left_goes(
    source: Path, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    extract(source, tmp_path / "local.h5")
    monkeypatch.setattr(module, "STUCK_SECONDS", 1)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.2)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    leave(temporary, "bottleneck", "folder")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    faults.set(numpy=WIDTH, log=str(tmp_path / "log"), stall_once=str(tmp_path / "stuck"))
    out, told = tmp_path / "out" / "f.h5", list[int]()
    with system_folder() as used:  # by another command: it stays
        result = extraction(source, out, ClusterShards("local:2")).run(
            lambda stage, done, total: told.append(done) if stage == "extract" else None
        )
        assert listing(temporary) == [used.name]
    assert (tmp_path / "stuck").exists()
    assert "has reported nothing for" in caplog.text
    assert (result.inferred, inferred(tmp_path / "log"), told[-1]) == (300, 300, 300)
    assert differences(tmp_path / "local.h5", out) == []
    assert (listing(out.parent), listing(temporary)) == (["f.h5"], [])


@pytest.mark.slow
def test_killed_workers_and_schedulers_cost_time_and_nothing_else(
    source: Path, cluster: Processes, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(source, tmp_path / "local.h5")
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 2)
    out, log = tmp_path / "out" / "f.h5", tmp_path / "log"
    faults.set(numpy=WIDTH, log=str(log), delay=0.4)
    scheduler = cluster.scheduler()
    workers = [cluster.worker("--no-nanny"), cluster.worker("--no-nanny", "--nthreads", 2)]
    told = 0

    def kill(stage: str, done: int, total: int) -> None:
        nonlocal told
        if stage != "extract" or done < 64 * (told + 1):
            return
        told += 1
        if told == 1:
            os.kill(workers[0].pid, signal.SIGKILL)
            cluster.worker("--no-nanny")
        elif told == 2:
            os.kill(scheduler.pid, signal.SIGKILL)

    with pytest.raises(ClusterError, match=r"the scheduler was lost.*All finished work is kept"):
        extraction(source, out, ClusterShards(cluster.address, patience=30)).run(kill)
    assert told == 2
    kept = len(list(parts_folder(out).glob("*.h5")))
    assert 4 <= kept <= 9
    # Begun on a cluster, finished here.
    result = extract(source, out)
    assert (result.inferred, differences(tmp_path / "local.h5", out)) == (300 - SHARD * kept, [])
    assert listing(out.parent) == ["f.h5"]


@pytest.mark.slow
def test_a_scheduler_that_comes_again_is_used_again_and_gpu_workers_alone_do_the_work(
    source: Path, cluster: Processes, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(source, tmp_path / "local.h5")
    scheduler = cluster.scheduler()
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.5)
    out = tmp_path / "out" / "f.h5"
    with pytest.raises(ClusterError, match=r"no worker for 1 s.*dask worker tcp://127.0.0.1:\d+ --nthreads 1"):
        extract(source, out, ClusterShards(cluster.address, patience=1))
    workers = [cluster.worker("--no-nanny", "--name", 0)]
    with pytest.raises(ConfigurationError, match=r"no worker announces one.*--resources GPU=1"):
        extract(source, out, ClusterShards(cluster.address), device="gpu")
    workers.append(cluster.worker("--no-nanny", "--resources", "GPU=1", "--name", 1))
    done = 0

    def watch(stage: str, count: int, total: int) -> None:
        nonlocal done
        if stage == "extract" and count >= 100 and not done:
            done = count
            os.kill(scheduler.pid, signal.SIGKILL)
            port = int(cluster.address.rpartition(":")[2])
            for worker in workers:
                worker.kill()
                worker.wait()
            cluster.scheduler(port)
            cluster.worker("--resources", "GPU=1", "--name", 2)

    with connected(cluster.address) as client:
        client.wait_for_workers(2, timeout=30)
    faults.set(numpy=WIDTH, log=str(tmp_path / "log"), delay=0.1)
    result = extraction(source, out, ClusterShards(cluster.address, patience=30)).run(watch)
    assert done >= 100
    assert differences(tmp_path / "local.h5", out) == []
    assert 300 <= inferred(tmp_path / "log") <= 300 + 2 * SHARD
    assert result.inferred == 300


@pytest.mark.slow
def test_workers_that_cannot_do_the_work_are_named_with_the_way_out(
    source: Path, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 1)
    begun = time.monotonic()
    with pytest.raises(ClusterError, match=r"no Dask scheduler answers there .*dask scheduler --port 8786"):
        extract(source, tmp_path / "f.h5", ClusterShards("tcp://127.0.0.1:1"))
    for words in (b"", b"SSH-2.0-OpenSSH_9.6\r\n"):  # what speaks another protocol, or waits to be spoken to
        with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
            heard = pool.submit(lambda server, words: server.accept()[0].sendall(words), server, words)
            address = "tcp://{}:{}".format(*server.getsockname())
            with pytest.raises(ClusterError, match="no Dask scheduler answers there"), connected(address):
                pass
            heard.result()
    assert time.monotonic() - begun < 60  # three waits of a second
    token = tmp_path / ".token"
    token.write_text("right\n")
    faults.set(numpy=WIDTH, visible=0.2)
    with connected("local:2") as client:
        check_workers(client, token, "right", str(source / "cat" / "0000.png"))
        faults.set(numpy=WIDTH, visible=0.2, versions={"keras": "3.0.0", "pillow": "9.0"}, blind=1)
        with pytest.raises(ClusterError) as problem:
            check_workers(client, token, "right", str(source / "lost.png"))
        said = str(problem.value)
        assert said.count("keras 3.0.0 instead of 3.15") == said.count("pillow 9.0 instead of ") == 2
        assert said.count(f"cannot see {token}. Mount that folder at the same path on every machine") == 1
        assert said.count("lost.png. Mount the images at the same path on every machine") == 2
        faults.set(numpy=WIDTH)
        with pytest.raises(ClusterError, match="cannot see"):  # another disk at the same path
            check_workers(client, token, "wrong")

    plan = PlanFile.written(tmp_path, [], SETTING, str(source / "lost.png"))
    with plan as written, pytest.raises(ClusterError, match=r"cannot see the image .*lost\.png\. Mount the images"):
        cluster_worker._plan(str(written.path), written.token)  # what a worker does that comes late
    faults.set(numpy=WIDTH, stranger=True)
    out = tmp_path / "out" / "g.h5"
    with pytest.raises(
        ClusterError, match=r"worker on \S+: this machine finds another network \(weights: 1+ instead of 0+\)"
    ):
        extract(source, out, ClusterShards("local:1"))
    (tmp_path / "error").write_text("the device fell off the bus")
    faults.set(numpy=WIDTH, error=str(tmp_path / "error"))
    with pytest.raises(
        ClusterError, match=r"a shard failed 3 times on the workers \(RuntimeError: the device fell off"
    ):
        extract(source, out, ClusterShards("local:1"))
    assert listing(out.parent) == []


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_it_is_finished_here(
    source: Path, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(source, tmp_path / "local.h5")
    out, log = tmp_path / "out" / "f.h5", tmp_path / "log"
    faults.set(numpy=WIDTH, log=str(log), delay=0.3)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    command = ["extract", source, "--out", out, "--shard-rows", SHARD, "--cluster", "local:2"]
    process = start(tmp_path / "here", *command, options=["--numpy", WIDTH], session=True)
    end = time.monotonic() + 60
    while inferred(log) < 100:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.15)  # into the middle of the next ones
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    code, errors = finish(process)
    assert code == 130, errors
    in_flight = 0 if "stopping after the shards in flight" in errors else 2 * SHARD  # it was just entering one
    assert "Run the same command again" in errors
    assert "Traceback" not in errors
    assert "lost" not in errors
    kept = len(list(parts_folder(out).glob("*.h5")))
    assert kept * SHARD <= inferred(log) <= kept * SHARD + in_flight
    others = {path.name for path in parts_folder(out).iterdir() if path.suffix != ".h5"}
    assert others == {"manifest.jsonl"} or in_flight
    assert extract(source, out).inferred == 300 - kept * SHARD
    assert differences(tmp_path / "local.h5", out) == []
    assert (listing(out.parent), listing(tmp_path / "tmp")) == (["f.h5"], [])


@pytest.mark.slow
def test_begun_here_and_finished_on_a_cluster_with_a_full_disk_between(
    source: Path, faults: Faults, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.strip()}")
    try:
        extract(source, tmp_path / "local.h5")
        out, filler = disk / "f.h5", disk / "filler"
        plan = (work := extraction(source, out)).plan()
        work.parts.open()
        shards = work.run_shards(work._work(plan), lambda _: None)
        for _ in range(3):
            work.parts.commit(next(shards).record)
        shards.close()
        before = len(list(parts_folder(out).glob("*.h5")))
        assert before >= 3
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 20 * 4096))
        with pytest.raises(StoreError, match=r"could not be written \(No space left on device"):
            extract(source, out, ClusterShards("local:1"))
        assert len(list(parts_folder(out).glob("*.h5"))) >= before
        assert not list(disk.rglob("*.tmp"))
        filler.unlink()
        result = extract(source, out, ClusterShards("local:1"))
        assert 0 < result.inferred <= 300 - SHARD * before
        assert differences(tmp_path / "local.h5", out) == []
        assert listing(disk) == ["f.h5"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

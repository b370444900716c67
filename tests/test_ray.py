"""`--engine ray`: a cluster makes the data set that one process makes, whatever happens to its nodes."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import psutil  # type: ignore[import-untyped]
import pytest

from preprocess import engine
from preprocess.__main__ import main
from preprocess.config import PreprocessConfig
from preprocess.probe import probe
from preprocess.sources import Source, write_sources
from preprocess.units import Made
from shared.errors import ConfigError, ModelError, UserError
from tests.conftest import ROOT, run_command
from tests.decoding import InProcessPool, use_stand_ins
from tests.ten_clips import facts, words, write_manifest
from tests.test_preprocess import Opened

# Before Ray is imported, which reads them once: a token of the tests' own, not the one in the user's home.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
ray = pytest.importorskip("ray")

from preprocess import actor, cluster, crew  # noqa: E402  they import ray

RAY = ("--engine", "ray")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """The ten clips."""
    return write_manifest(tmp_path_factory.mktemp("clips for ray"))


@pytest.fixture
def alone(tiny_2b, manifest, tmp_path, monkeypatch):
    """The cache of one process, made by stand-ins."""
    use_stand_ins(monkeypatch)
    assert main(words(tmp_path / "alone", tiny_2b, manifest)) == 0
    return tmp_path / "alone"


# Without a cluster


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"ray_address": "auto"}, "--ray_address auto: is of --engine ray; this is local"),
        ({"engine": "ray", "num_workers": 2}, "--engine ray with --num_workers 2: one driver"),
        ({"engine": "ray", "tile": "auto"}, "--tile auto with --engine ray: the nodes' memory is not this machine's"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, told):
    with pytest.raises(ConfigError, match=told):
        PreprocessConfig(pretrained_model_name_or_path="model", **flags)


def test_a_missing_package_is_told_with_its_extra_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ray is not installed; run `pip install '\.\[ray\]' -c constraints\.txt`"):
        main(words(tmp_path / "cache", tmp_path / "no model", tmp_path / "no manifest", *RAY))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_without_a_cluster_is_told(tiny_2b, manifest, tmp_path, monkeypatch, address):
    use_stand_ins(monkeypatch)
    with pytest.raises(ConfigError, match=f"--ray_address {address}: no cluster can be reached there"):
        main(words(tmp_path / "cache", tiny_2b, manifest, *RAY, "--ray_address", address))


def test_a_second_run_encodes_nothing_and_starts_no_ray(alone, tiny_2b, manifest, monkeypatch):
    monkeypatch.setattr(crew, "_connect", lambda address: pytest.fail("a Ray was started"))
    before = facts(alone)
    assert main(words(alone, tiny_2b, manifest, *RAY)) == 0
    assert facts(alone) == before
    assert Opened(alone, "squares").encoded == (0, 0)


@pytest.mark.parametrize(
    ("resources", "needs", "room"),
    [
        ([{"CPU": 4}, {"CPU": 16, "GPU": 2}, {"GPU": 1}], {"num_gpus": 1, "num_cpus": 0}, 3),
        ([{"CPU": 4}, {"CPU": 2}, {}], {"num_cpus": 4}, 1),  # the head node is too small
        ([{"CPU": 32}, {"CPU": 20}], {"num_cpus": 8}, 6),
        ([{}], {"num_cpus": 1}, 0),  # an autoscaler's head node
    ],
)
def test_an_actor_asks_for_a_gpu_or_for_cpus(resources, needs, room):
    nodes = [{"Alive": True, "Resources": one} for one in resources]
    nodes.append({"Alive": False, "Resources": {"CPU": 64, "GPU": 8}})
    assert crew._needs(nodes) == needs
    assert crew._room(nodes, needs) == room


def test_the_nodes_get_the_code_alone_and_the_same_bytes_for_the_same_code(tmp_path):
    first, second = crew._pack_code(tmp_path / "a.zip"), crew._pack_code(tmp_path / "b.zip")
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 1_000_000
    code = "import sys; sys.path.insert(0, sys.argv[1]); import preprocess.actor; print(preprocess.actor.__file__)"
    done = subprocess.run([sys.executable, "-c", code, first], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(first) in done.stdout
    assert {name.split("/")[0] for name in zipfile.ZipFile(first).namelist()} == {"preprocess", "shared"}


class LossyCrew:
    """Stands in for `preprocess.cluster.Crew`: an encoder in this process that is "lost" with every unit once.

    Every other one is lost after it has published the unit, the rest before.
    """

    lost: list[str] = []  # noqa: RUF012

    def __init__(self, address, worker, *arguments):
        self._encoder = worker(*arguments)

    def __enter__(self):
        self._encoder.open()
        return self

    def __exit__(self, *_):
        self._encoder.close()

    def work(self, method, units, count, split):
        """As Crew."""
        for number, unit in enumerate(units):
            if number % 2:
                getattr(self._encoder, method)(unit)
            missing, found, answer = split(unit)
            assert bool(missing) == (number % 2 == 0)
            self.lost.append(method)
            yield found, answer
            if missing:
                yield missing, getattr(self._encoder, method)(missing)
        assert number + 1 == count


def test_units_whose_answer_was_lost_are_made_once_and_counted(alone, tiny_2b, manifest, tmp_path, monkeypatch):
    class Pool(InProcessPool):
        def close(self):
            pass

    monkeypatch.setattr(actor, "DecodePool", Pool)
    monkeypatch.setattr(cluster, "Crew", LossyCrew)
    monkeypatch.setattr(LossyCrew, "lost", [])
    cache = tmp_path / "cache"
    assert main(words(cache, tiny_2b, manifest, *RAY, "--dataloader_num_workers", "1")) == 0
    assert LossyCrew.lost.count("encode_prompts") == 5
    assert LossyCrew.lost.count("encode_clips") == 4
    assert facts(cache) == facts(alone)
    assert Opened(cache, "squares").encoded == Opened(alone, "squares").encoded
    assert sorted(path.name for path in cache.rglob("*.tar")) == sorted(path.name for path in alone.rglob("*.tar"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "float16"}, "--dtype auto means float32 for the latents on this node and float16 where the driver"),
        ({"vae": {"weights": "others"}}, "latents of its checkpoint differ from the driver's in vae; --pretrained"),
    ],
)
def test_a_node_that_would_encode_other_numbers_is_refused(tiny_2b, alone, tmp_path, change, told):
    config = PreprocessConfig(
        cache=str(tmp_path / "cache"), pretrained_model_name_or_path=str(tiny_2b), dataloader_num_workers=1
    )
    stores = Opened(alone, "squares").dataset.info["facts"]
    with pytest.raises(ModelError, match=told):
        actor.Encoder(config, {**stores, "latents": {**stores["latents"], **change}}, frozenset()).open()
    assert not [path for path in (tmp_path / "cache/writers").iterdir() if path.is_dir()], "its folder is removed"
    opened = actor.Encoder(config, stores, frozenset())
    assert opened.open()
    opened.close()


# On a cluster


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster of one node with one CPU; tests add a second one."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        told = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
        started = Cluster(initialize_head=True, head_node_args=told)
        yield started
        started.shutdown()


def add_node(nodes):
    """A second node with one CPU."""
    return nodes.add_node(num_cpus=1, object_store_memory=100 << 20)


def run_on(nodes, cache, model, manifest, *flags):
    """Run stage 1 on the cluster, as a user does."""
    told = words(cache, model, manifest, *RAY, "--ray_address", nodes.address, *flags)
    return run_command("-m", "preprocess", *told)


def start_on(nodes, cache, model, manifest):
    """Start stage 1 on the cluster."""
    flags = words(cache, model, manifest, *RAY, "--ray_address", nodes.address)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", "preprocess", *flags], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def stop_at_work(node, cache, driver, kind):
    """Stop an actor on a node while it has a part of a kind in the making; returns its process, stopped."""
    raylet = node.all_processes["raylet"][0].process.pid
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and driver.poll() is None:
        parts = {int(path.parts[-2].split("-")[-2]): path for path in cache.glob("writers/*/part-*")}
        for process in psutil.Process(raylet).children():
            if process.pid in parts and list(cache.glob(f"{kind}/*/*.parquet")):
                process.suspend()
                if parts[process.pid].exists():  # else it has just finished it
                    return process
                process.resume()
        time.sleep(0.002)
    driver.kill()
    raise AssertionError(f"no actor was seen at work: {driver.communicate()}")


def promise_a_frame(cache, video):
    """Let a cache remember one frame more than a video holds: its clip fails at its decoder."""
    path, stat = str(video.resolve()), video.stat()
    known = probe(path)
    longer = replace(known, pts=(*known.pts, 2 * known.pts[-1] - known.pts[-2]))
    digest = hashlib.sha256(video.read_bytes()).hexdigest()
    cache.mkdir()
    write_sources(cache / "sources.parquet", [Source(path, stat.st_size, stat.st_mtime_ns, digest, longer)])


@pytest.mark.slow
def test_a_node_removed_in_mid_run_changes_nothing(nodes, tiny_2b, manifest, tmp_path):
    cache = tmp_path / "cache"
    for one in (cache, tmp_path / "alone"):
        promise_a_frame(one, manifest.parent / "4.mp4")
    node = add_node(nodes)
    driver = start_on(nodes, cache, tiny_2b, manifest)
    stopped = stop_at_work(node, cache, driver, "latents")
    nodes.remove_node(node, allow_graceful=False)
    stopped.kill()  # it cannot see that its node is gone
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert "lost an actor on" in err
    assert main(words(tmp_path / "alone", tiny_2b, manifest)) == 0
    assert facts(cache) == facts(tmp_path / "alone")
    assert Opened(cache, "squares").encoded == Opened(tmp_path / "alone", "squares").encoded
    assert [row["reason"] for row in Opened(cache, "squares").rejected] == ["over_reports_frames", "unreadable"]
    assert "rejected  1 over_reports_frames" in out
    again = run_on(nodes, cache, tiny_2b, manifest)
    assert (again.returncode, Opened(cache, "squares").encoded) == (0, (0, 0))


@pytest.mark.slow
def test_a_users_mistake_that_an_actor_meets_is_one_line(nodes, tiny_2b, manifest, tmp_path):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_2b, tmp_path / "model")
    weights = load_file(model / "text_encoder/model.safetensors")
    weights["encoder.final_layer_norm.weight"].fill_(float("nan"))
    save_file(weights, model / "text_encoder/model.safetensors", {"format": "pt"})
    done = run_on(nodes, tmp_path / "cache", model, manifest)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "T5's embedding of '' is not finite; give --dtype bfloat16 or float32" in line
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "cache").glob("writers/*/")), "the actors have cleaned up"


@pytest.mark.slow
def test_sigterm_ends_a_run_in_order(nodes, tiny_2b, manifest, tmp_path):
    cache = tmp_path / "cache"
    driver = start_on(nodes, cache, tiny_2b, manifest)
    encoder = stop_at_work(nodes.head_node, cache, driver, "embeddings")
    family = [encoder, *encoder.children(recursive=True)]
    encoder.resume()
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert not list(cache.glob("writers/*/")), "unfinished files are removed"
    assert list(cache.glob("embeddings/*/*.parquet")), "what was published stays"


class Doubler:
    """An actor that doubles numbers; told to, it dies or fails."""

    def __init__(self, folder):
        self._folder = folder

    def open(self):
        """The node's name."""
        with open(f"{self._folder}/{os.getpid()}", "w"):
            pass
        return ray.get_runtime_context().get_node_id()

    def double(self, numbers):
        """Notes where."""
        if "die" in numbers:
            os._exit(1)
        if "fail" in numbers:
            raise ModelError("as a user's mistake")
        time.sleep(0.3)
        node = ray.get_runtime_context().get_node_id()
        with open(f"{self._folder}/doubled", "a") as file:
            file.write(json.dumps([node, numbers]) + "\n")
        return actor.Answer(Made(), [(b"", "double", str(2 * number)) for number in numbers])

    def close(self):
        """Notes it."""
        os.unlink(f"{self._folder}/{os.getpid()}")


class CannotStart(Doubler):
    """An actor that dies as soon as it starts."""

    def open(self):
        """Dies."""
        os._exit(1)


@pytest.fixture
def work(nodes, tmp_path, monkeypatch):
    """Has a crew double units of numbers; tells the doubles, and the nodes that made them."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def double(
        units, split=lambda unit: (unit, [], actor.Answer(Made())), worker=Doubler, during=lambda: None, on=nodes
    ):
        doubles = []
        with crew.Crew(on.address, worker, str(tmp_path)) as members:
            for number, (_, answer) in enumerate(members.work("double", iter(units), len(units), split)):
                doubles += [int(double) for _, _, double in answer.failures]
                if number == 0:
                    during()
        return sorted(doubles), {json.loads(line)[0] for line in (tmp_path / "doubled").read_text().splitlines()}

    yield double
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.slow
def test_a_node_that_joins_takes_part(work, nodes, tmp_path):
    joined = []
    doubles, where = work([[number] for number in range(60)], during=lambda: joined.append(add_node(nodes)))
    nodes.remove_node(joined[0])
    assert doubles == [2 * number for number in range(60)]
    assert len(where) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["doubled"], "all actors were closed"


@pytest.mark.slow
def test_a_cluster_that_loses_its_last_node_is_waited_for(work, monkeypatch):
    """The head has no CPU to give: nothing is left but to wait, to say so, and to go on when a node joins."""
    from ray.cluster_utils import Cluster

    told, removed, joined = list[str](), list[object](), list[object]()

    def tell(line):
        told.append(line)
        if removed and not joined and "the cluster has no room yet" in line:
            joined.append(add_node(bare))

    monkeypatch.setattr(crew, "warn", tell)
    monkeypatch.setattr(crew, "ROOM_SECONDS", 1.0)
    monkeypatch.setattr(crew, "LOOK_SECONDS", 0.5)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20}
    bare = Cluster(initialize_head=True, head_node_args=head)
    try:
        last = add_node(bare)

        def remove():
            bare.remove_node(last, allow_graceful=False)
            removed.append(last)

        doubles, where = work([[number] for number in range(20)], during=remove, on=bare)
    finally:
        bare.shutdown()
    assert doubles == [2 * number for number in range(20)]
    assert len(where) == 2
    assert any("lost an actor on" in line for line in told)


@pytest.mark.slow
def test_a_unit_that_kills_its_actors_is_blamed_after_some_tries(work, capsys):
    with pytest.raises(UserError, match=r"a unit of 2 lost its actor 4 times, at last as .*what was published stays"):
        work([["die", 1]])
    assert capsys.readouterr().err.count("lost an actor on") == crew.TRIES


@pytest.mark.slow
def test_units_beside_one_that_kills_its_actor_are_done_again(work):
    def split(unit):
        return [item for item in unit if item != "die"], ["die"], actor.Answer(Made())

    assert work([[1], ["die", 2], [3]], split)[0] == [2, 4, 6]


@pytest.mark.slow
def test_actors_that_cannot_start_end_the_run(work):
    with pytest.raises(UserError, match=r"--engine ray: actors do not start: .*see Ray's logs"):
        work([[1]], worker=CannotStart)
    with pytest.raises(ModelError, match=r"^as a user's mistake$"):
        work([["fail"]])


@pytest.mark.slow
def test_a_cluster_without_room_is_told(work, monkeypatch):
    class ToldError(Exception):
        pass

    def tell(line):
        raise ToldError(line)

    monkeypatch.setattr(crew, "warn", tell)
    monkeypatch.setattr(crew, "_needs", lambda nodes: {"num_cpus": 99})
    monkeypatch.setattr(crew, "ROOM_SECONDS", 0.5)
    monkeypatch.setattr(crew, "LOOK_SECONDS", 0.3)
    with pytest.raises(ToldError, match="no room yet for an actor that needs 99 CPUS; see `ray status`"):
        work([[1]])

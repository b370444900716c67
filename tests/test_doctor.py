"""The doctor: what it says of installations and model folders that are broken, each in its own way.

Broken installations are real: virtual environments with links to some of the packages, and some of these altered.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared.packages import Package, install_command, read_packages, release
from tests.conftest import ROOT, run_command

SITE = Path(sysconfig.get_paths()["purelib"])


class Installation:
    """A virtual environment of its own, which has links to packages of this one."""

    def __init__(self, folder: Path, without: tuple[str, ...] = (), only: tuple[str, ...] | None = None) -> None:
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        for path in SITE.iterdir():
            name = re.split(r"[-.]", path.name)[0].lower()
            if name not in without and (only is None or name in only) and path.suffix != ".pth":
                (self.site / path.name).symlink_to(path)

    def alter(self, name: str, text: str) -> None:
        """Put a module in a package's place."""
        (self.site / name).unlink(missing_ok=True)
        (self.site / f"{name}.py").write_text(text, encoding="utf-8")

    def pretend(self, distribution: str, version: str) -> None:
        """Have a package's metadata tell another version."""
        (link,) = self.site.glob(f"{distribution}-*.dist-info")
        text = (link / "METADATA").read_text(encoding="utf-8")
        link.unlink()
        link.mkdir()
        (link / "METADATA").write_text(re.sub(r"(?m)^Version: .*$", f"Version: {version}", text, count=1))

    def doctor(self, *flags: str) -> tuple[int, dict[str, dict], str]:
        """Its exit status, its findings by name, and what it prints without --json."""
        words = [str(self.python), "-m", "shared.doctor", *flags]
        settings = {"cwd": ROOT, "capture_output": True, "text": True, "check": False, "timeout": 300}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        told = subprocess.run([*words, "--json"], env=environment, **settings)  # type: ignore[call-overload]
        shown = subprocess.run(words, env=environment, **settings)  # type: ignore[call-overload]
        assert (told.stderr, shown.stderr) == ("", "")
        answer = json.loads(told.stdout)
        assert told.returncode == shown.returncode == (0 if answer["ok"] else 2)
        return told.returncode, {finding["name"]: finding for finding in answer["findings"]}, shown.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return Installation(tmp_path_factory.mktemp("bare"), only=())


def test_a_whole_installation_and_a_whole_model_are_well(tiny_2b):
    done = run_command("-m", "shared.doctor", "--model", str(tiny_2b))
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) < 25, "one screen"
    assert all(re.match(r"(ok|note) ", line) for line in lines if line and not line.startswith("extras are"))
    for told in (
        rf"ok +python +{re.escape(sys.version.split()[0])}, ",
        r"(ok|note) +packages +\d+ of \d+ as tested",
        r"ok +memory +[\d.]+ GiB free, \d+ cores",
        r"ok +av +[\d.]+ writes H.264 and reads it",
        r"ok +decord +[\d.]+ reads VP9",
        rf"ok +model +{re.escape(str(tiny_2b))}: CogVideoX 1.0 text-to-video \(sin-cos positions\), whole",
    ):
        assert re.search(f"(?m)^{told}", done.stdout), told
    assert "to mend it" not in done.stdout


def test_with_no_package_at_all_each_is_told_and_one_command_a_package_mends_it(bare):
    status, found, shown = bare.doctor()
    assert status == 2
    asked = [re.split(r"[>=]", line)[0] for line in dependencies()]
    assert [name for name in asked if found[name]["status"] != "missing"] == []
    assert found["av"]["status"] == found["decord"]["status"] == "missing"
    assert found["python"]["status"] == found["memory"]["status"] == "ok"
    assert found["extra ray"]["detail"] == "lacks ray"
    assert found["packages"]["detail"].startswith("0 of ")
    commands = shown.split("to mend it:\n")[1].splitlines()
    assert f"    {bare.python} -m pip install -c {ROOT}/constraints.txt av" in commands


def dependencies():
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_a_missing_decoder_is_told_and_the_others_are_looked_at(tmp_path):
    status, found, shown = Installation(tmp_path, without=("decord", "decord2", "optimum", "torchvision")).doctor()
    assert status == 2
    assert [name for name, finding in found.items() if finding["status"] not in ("ok", "note")] == ["decord2", "decord"]
    assert found["decord"]["detail"] == "No module named 'decord'"
    assert found["av"]["status"] == "ok"
    assert found["extra quant"] == {
        "name": "extra quant", "status": "note", "detail": "lacks optimum-quanto", "mend": found["extra quant"]["mend"],
    }  # fmt: skip
    assert shown.split("to mend it:\n")[1].splitlines()[0].endswith("constraints.txt decord2")


def test_broken_libraries_are_wrong_whatever_they_do(tmp_path):
    """One that does not import, one that kills its process, one that raises while it works."""
    installation = Installation(tmp_path, without=("av", "decord", "torch"))
    installation.alter("av", "raise ImportError('libavcodec.so.61: cannot open shared object file')")
    installation.alter("decord", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    installation.alter("torch", "raise RuntimeError('built for another machine')")
    status, found, shown = installation.doctor()
    assert status == 2
    assert (found["av"]["status"], found["decord"]["status"], found["gpu"]["status"]) == ("wrong",) * 3
    assert "libavcodec.so.61" in found["av"]["detail"]
    assert "status -11" in found["decord"]["detail"]
    assert "RuntimeError: built for another machine" in found["gpu"]["detail"]
    assert "constraints.txt torch --force-reinstall" in shown


def test_a_decoder_that_shows_other_colours_is_wrong(tmp_path):
    installation = Installation(tmp_path, without=("decord",))
    installation.alter(
        "decord",
        "import numpy\n__version__ = '0'\n"
        "class VideoReader:\n"
        "    def __init__(self, path): pass\n"
        "    def get_batch(self, indices): return self\n"
        "    def asnumpy(self): return numpy.zeros((3, 64, 384, 3), numpy.uint8)\n",
    )
    _, found, _ = installation.doctor()
    assert found["decord"]["status"] == "wrong"
    assert re.fullmatch(r"0 reads VP9: colours are off by 2\d\d of 255", found["decord"]["detail"])


def test_versions_are_compared_with_the_bounds_and_the_tested_set(tmp_path):
    installation = Installation(tmp_path)
    installation.pretend("tyro", "0.9.2")
    installation.pretend("safetensors", "99.1")
    status, found, shown = installation.doctor()
    assert status == 2
    assert found["tyro"]["status"] == "wrong"
    assert re.fullmatch(r"0\.9\.2; must be 1\.0 or newer, tested with [\d.]+", found["tyro"]["detail"])
    assert found["packages"]["status"] == "note"
    assert re.search(r"other releases: .*safetensors 99\.1 \(tested [\d.]+\)", found["packages"]["detail"])
    assert shown.split("to mend it:\n")[1].splitlines() == [
        f"    {installation.python} -m pip install -c {ROOT}/constraints.txt tyro"
    ]


def test_a_cpu_build_beside_a_driver_is_wrong(monkeypatch):
    import torch

    from shared import doctor

    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    monkeypatch.setattr(doctor, "_driver", lambda: "570.86")
    (finding,) = doctor.check_gpu()
    assert (finding.status, finding.name) == ("wrong", "gpu")
    assert finding.detail.startswith("driver 570.86 is there, but torch ")
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    (finding,) = doctor.check_gpu()
    assert finding.status == "note"


@pytest.mark.parametrize("right", [True, False])
def test_each_gpu_is_told_with_its_memory_and_must_multiply(monkeypatch, right):
    import torch

    from shared import doctor

    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        mem_get_info=lambda index: (3 << 30, (8 + index) << 30),
        get_device_name=lambda index: f"GPU of {index}",
    )
    version = SimpleNamespace(cuda="12.8", hip=None)
    ones = lambda *size, device: torch.full(size, 1.0 if right or device == "cuda:0" else 2.0)  # noqa: E731
    stand_in = SimpleNamespace(cuda=cuda, version=version, ones=ones, __version__="2.13.0")
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    monkeypatch.setattr(doctor, "_driver", lambda: "570.86")
    first, second = doctor.check_gpu()
    assert first.status == "ok"
    assert first.detail == "GPU of 0, 3.0 GiB of 8.0 GiB free, driver 570.86, CUDA 12.8, torch 2.13.0"
    assert second.status == ("ok" if right else "wrong")


def test_a_full_disk_is_wrong(monkeypatch, tmp_path):
    from shared import doctor

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    wrong = [finding for finding in doctor.check_memory() if finding.status == "wrong"]
    assert wrong[0].detail == f"0.0 GiB free at {tmp_path}"
    assert wrong[0].mend == f"du -xsh {tmp_path}/* | sort -h"


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda model: shutil.rmtree(model / "vae"), r"vae/config.json: is missing.*; and \d more"),
        (lambda model: (model / "model_index.json").unlink(), "has no model_index.json"),
        (lambda model: (model / "transformer" / "config.json").write_text("{"), "not JSON"),
        (lambda model: (model / "tokenizer" / "spiece.model").unlink(), "neither spiece.model nor tokenizer.json"),
        (lambda model: cut(model / "vae" / "diffusion_pytorch_model.safetensors"), r"\.safetensors: lacks 1,000 bytes"),
        (lambda model: (model / "text_encoder" / "model.safetensors").write_bytes(b""), "not a safetensors file"),
        (lambda model: (model / "text_encoder" / "model.safetensors").unlink(), "has no model.safetensors"),
    ],
)
def test_an_incomplete_model_is_told_with_its_file_and_how_to_fetch_it(tiny_2b, tmp_path, break_it, said):
    from shared.doctor import check_model

    model = Path(shutil.copytree(tiny_2b, tmp_path / "model"))
    break_it(model)
    (finding,) = check_model(str(model))
    assert finding.status == "wrong"
    assert re.search(said, finding.detail)
    assert finding.mend is not None
    assert re.fullmatch(
        rf"hf download (THUDM/CogVideoX-2b|OWNER/NAME) --local-dir {re.escape(str(model))}", finding.mend
    )


def cut(path):
    os.truncate(path, path.stat().st_size - 1000)


def test_a_shard_that_is_missing_is_told(tiny_2b, tmp_path):
    from shared.doctor import check_model

    model = Path(shutil.copytree(tiny_2b, tmp_path / "model"))
    whole = model / "transformer" / "diffusion_pytorch_model.safetensors"
    names = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}
    whole.rename(whole.with_name(names["a"]))
    index = whole.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": names}))
    (finding,) = check_model(str(model))
    assert "x-00002-of-00002.safetensors: is missing" in finding.detail
    assert finding.mend == f"hf download THUDM/CogVideoX-2b --local-dir {model}"


def test_the_command_ends_with_2_and_the_way_to_mend_a_model(tmp_path):
    done = run_command("-m", "shared.doctor", "--model", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert re.search(r"(?m)^missing +model +\S+/nowhere: no such folder", done.stdout)
    assert done.stdout.endswith(f"to mend it:\n    hf download OWNER/NAME --local-dir {tmp_path}/nowhere\n")


def test_of_a_hub_id_the_hubs_cache_is_looked_at_and_nothing_is_fetched(tiny_2b, tmp_path, monkeypatch):
    from shared.doctor import check_model

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (finding,) = check_model("tiny/model")
    assert (finding.status, finding.mend) == ("missing", "hf download tiny/model")
    repository, commit = tmp_path / "models--tiny--model", "a" * 40
    snapshot = Path(shutil.copytree(tiny_2b, repository / "snapshots" / commit))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (finding,) = check_model("tiny/model")
    assert finding.status == "ok"
    assert finding.detail.startswith("tiny/model: CogVideoX 1.0 text-to-video")
    cut(snapshot / "vae" / "diffusion_pytorch_model.safetensors")
    (finding,) = check_model("tiny/model")
    assert (finding.status, finding.mend) == ("wrong", "hf download tiny/model")
    assert "lacks 1,000 bytes" in finding.detail


def test_every_kind_of_checkpoint_is_fetched_by_its_own_name(tmp_path):
    from shared.doctor import check_model
    from tests import tiny_model

    for kind in ("5b-i2v", "1.5-5b"):
        model = tiny_model.build(tmp_path / kind, kind)
        (model / "model_index.json").unlink()
        (finding,) = check_model(str(model))
        assert finding.mend is not None
        assert finding.mend.split()[2].lower().replace("x1.5", "x-1.5") == f"thudm/cogvideox-{kind}"


def test_a_mistake_is_one_line(tmp_path):
    done = run_command("-m", "shared.doctor", "--modell", "2b")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unrecognized arguments: --modell 2b; see python -m shared.doctor --help\n"


def test_releases_are_compared_by_number():
    assert release("2.10") > release("2.9.9")
    assert release("2.0") == release("2.0.0") == release("2.0.0+cpu")
    assert release("5.0.0rc1") == release("5.0")
    assert not Package("torch", "2.9", "2.13.0", "2.13.0+cpu").is_untested
    assert Package("torch", "2.9", "2.13.0", "2.12.1").is_untested
    assert Package("torch", "2.9", "2.13.0", "2.8").is_too_old


def test_what_is_not_in_the_tested_set_is_installed_by_its_bound():
    words = shlex.split(install_command(read_packages(["optimum-quanto>=0.2", "moto[s3] >= 5.1"])))
    assert words[1:] == ["-m", "pip", "install", "-c", f"{ROOT}/constraints.txt", "optimum-quanto>=0.2", "moto"]

"""Clips that cannot be used: one reason each, remembered, and nothing else hindered; and sources that change or go."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess import encode, files, pipeline
from preprocess.__main__ import main
from preprocess.decode import DecodePool
from preprocess.frames import Placement
from preprocess.sources import Sources, known_sources
from preprocess.spool import Spool
from shared.cache import Cache
from shared.errors import REJECTION_REASONS, CacheError, ManifestError, VideoError, run_command
from shared.storage import Storage, canonical_json
from tests.conftest import ROOT, moving_square, write_video
from tests.decoding import InProcessPool, StandInVideoEncoder
from tests.test_preprocess import preprocess

SIZE = ["--height", "32", "--width", "48", "--max_num_frames", "9"]
# The real child, but for files named after what befalls their decoder, and without torch, which takes long to start:
CHILD = """
import dataclasses, os, sys, time
import numpy as np
from preprocess import decode, video

def probe(path):
    befall(path, "probe")
    facts = real_probe(path)
    if "promises" in path:
        facts = dataclasses.replace(facts, pts=tuple(facts.pts[1] * number for number in range(20)))
    return facts

def read_frames(path, *arguments):
    befall(path, "read")
    return real_read(path, *arguments)

def befall(path, task):
    if f"hang_in_{task}" in path:
        time.sleep(600)
    if f"crash_in_{task}" in path:
        os.kill(os.getpid(), 9)

real_probe, decode.probe = decode.probe, probe
real_read, decode.read_frames = decode.read_frames, read_frames
decode._import_libraries = lambda task: None
video._place = lambda picture, placement: np.full((placement.height, placement.width, 3), picture.mean(), np.uint8)
decode.serve(sys.stdin.buffer, sys.stdout.buffer)
"""
REASONS = {
    "a_good": None,
    "b_hang_in_probe": "timed_out",
    "c_hang_in_read": "timed_out",
    "d_crash_in_probe": "decoder_crashed",
    "e_crash_in_read": "decoder_crashed",
    "f_text": "unreadable",
    "g_sound": "no_video_stream",
    "h_short": "too_short",
    "i_slow": "low_frame_rate",
    "j_promises": "over_reports_frames",
    "k_wide": "aspect_differs",
    "l_white": "non_finite",
    "m_good": None,
}


class WhiteIsNotFinite(StandInVideoEncoder):
    def encode(self, frames):
        moments = super().encode(frames)
        moments[frames.mean(axis=(1, 2, 3, 4)) > 250] = np.nan
        return moments


@pytest.fixture(scope="module")
def mishaps(tmp_path_factory):
    """A clip for each thing that can go wrong, between two good ones, each with its caption."""
    folder = tmp_path_factory.mktemp("mishaps") / "clips"
    folder.mkdir()
    for number, (name, reason) in enumerate(REASONS.items()):
        path = folder / f"{name}.mp4"
        path.with_suffix(".txt").write_text(f"the caption of {name}")
        frames = moving_square(number, 5 if reason in ("too_short", "over_reports_frames") else 20, 48, 72)
        if reason == "aspect_differs":
            frames = frames[:, :, :48]
        if reason == "non_finite":
            frames = np.full_like(frames, 255)
        if reason == "unreadable":
            path.write_bytes(b"no video at all")
        elif reason == "no_video_stream":
            write_sound(path)
        else:
            write_video(path, frames, 2 if reason == "low_frame_rate" else 8)
    return folder


def write_sound(path):
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", 8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def first_run(mishaps, tiny_2b):
    """What became of them in a first run, with children that hang and crash."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "DecodePool", lambda _, timeout: DecodePool(2, timeout, [sys.executable, "-c", CHILD]))
        patch.setattr(encode, "VideoEncoder", WhiteIsNotFinite)
        return reject(mishaps.with_name("cache"), tiny_2b, mishaps, "--decode_timeout", "8")


def reject(cache, model, folder, *flags):
    return preprocess(cache, model, folder, "--video_reshape_mode", "none", *flags, size=SIZE)


@pytest.fixture
def cache(first_run, mishaps, tmp_path, monkeypatch):
    """A copy of the cache after that run. Decoding hangs and crashes no more."""
    monkeypatch.setattr(pipeline, "DecodePool", InProcessPool)
    monkeypatch.setattr(encode, "VideoEncoder", StandInVideoEncoder)
    return shutil.copytree(mishaps.with_name("cache"), tmp_path / "cache")


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Two clips and their captions, to change at will."""
    monkeypatch.setattr(pipeline, "DecodePool", InProcessPool)
    monkeypatch.setattr(encode, "VideoEncoder", StandInVideoEncoder)
    folder = tmp_path / "two"
    folder.mkdir()
    for number in range(2):
        write_video(folder / f"{number}.mp4", moving_square(number, 9, 48, 72))
        (folder / f"{number}.txt").write_text(f"caption {number}")
    return folder


def told(opened):
    reasons = {row["source"]: row["reason"] for row in opened.rejected}
    return {**{row["source"]: None for row in opened.rows}, **reasons}


def test_each_mishap_has_its_reason_and_no_caption_moves(first_run):
    assert told(first_run) == {f"{name}.mp4": reason for name, reason in REASONS.items()}
    for row in first_run.rows + first_run.rejected:
        assert row["caption"] == f"the caption of {row['source'].removesuffix('.mp4')}"
    counts = {reason: list(REASONS.values()).count(reason) for reason in REASONS.values() if reason}
    assert first_run.report["rejected"] == dict(sorted(counts.items()))


def test_every_reason_is_tried_here_and_documented():
    assert {reason for reason in REASONS.values() if reason} == REJECTION_REASONS.keys()
    page = (ROOT / "docs" / "format.md").read_text()
    table = page.split("| reason | |\n|---|---|\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == list(REJECTION_REASONS)


def test_a_second_run_waits_for_no_known_hang(cache, mishaps, tiny_2b, monkeypatch):
    class OnlyTheWhite(InProcessPool):
        def probe(self, path):
            raise AssertionError(f"{path} is known")

        def read(self, path, *arguments, **options):
            assert "white" in path, f"{path} is known"
            return super().read(path, *arguments, **options)

    monkeypatch.setattr(pipeline, "DecodePool", OnlyTheWhite)
    second = reject(cache, tiny_2b, mishaps)
    expected = {**{f"{name}.mp4": reason for name, reason in REASONS.items()}, "l_white.mp4": None}
    assert told(second) == expected, "what is not finite depends on the VAE and its dtype: it is tried again"
    assert second.encoded[0] == 1


def test_retry_rejected_tries_again(cache, mishaps, tiny_2b):
    again = reject(cache, tiny_2b, mishaps, "--retry_rejected")
    mended = ("b_hang_in_probe", "c_hang_in_read", "d_crash_in_probe", "e_crash_in_read", "l_white")
    expected = {name: None if name in mended else reason for name, reason in REASONS.items()}
    expected["j_promises"] = "too_short"  # its probe tells the truth now
    assert told(again) == {f"{name}.mp4": reason for name, reason in expected.items()}
    assert again.encoded[0] == len(mended)
    assert told(reject(cache, tiny_2b, mishaps)) == told(again)


def test_a_verdict_on_a_file_does_not_hide_what_the_cache_holds(cache, mishaps, tiny_2b, tmp_path):
    """The same bytes elsewhere were read without trouble."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for suffix in ("mp4", "txt"):
        shutil.copy(mishaps / f"c_hang_in_read.{suffix}", elsewhere)
    assert reject(cache, tiny_2b, elsewhere).encoded[0] == 1
    opened = reject(cache, tiny_2b, mishaps)
    assert told(opened)["c_hang_in_read.mp4"] is None
    assert told(opened)["e_crash_in_read.mp4"] == "decoder_crashed"


def test_a_mended_video_is_taken(cache, mishaps, tiny_2b, tmp_path):
    folder = shutil.copytree(mishaps, tmp_path / "clips")
    assert told(reject(cache, tiny_2b, folder))["f_text.mp4"] == "unreadable"
    write_video(folder / "f_text.mp4", moving_square(99, 20, 48, 72))
    opened = reject(cache, tiny_2b, folder)
    assert told(opened)["f_text.mp4"] is None
    assert opened.encoded == (1, 1)


def test_truncated_prompts_and_duplicate_captions_are_counted_and_listed(clips, tiny_2b, tmp_path, capsys):
    for number, caption in {0: "the same", 1: "the same", 2: "word " * 300, 3: "w"}.items():
        shutil.copy(clips / f"{number % 2}.mp4", clips / f"{number}.mp4") if number > 1 else None
        (clips / f"{number}.txt").write_text(caption)
    opened = preprocess(tmp_path / "cache", tiny_2b, clips, size=SIZE)
    assert (opened.report["truncated"], opened.report["duplicate_captions"]) == (1, 1)
    assert [(row["source"], row["tokens"] > 226) for row in opened.rows if row["truncated"]] == [("2.mp4", True)]
    printed = capsys.readouterr().out
    assert "truncated 1 prompts, longer than T5 may read: 2.mp4" in printed
    assert "duplicate caption 'the same' of 2 clips: 0.mp4, 1.mp4" in printed


def test_a_prompt_of_just_226_tokens_is_not_truncated(clips, tiny_2b, tmp_path):
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(tiny_2b / "tokenizer")
    words = next(count for count in range(1, 300) if len(tokenizer("a " * count).input_ids) == 226)
    for number in range(2):
        (clips / f"{number}.txt").write_text(" ".join("a" * (words + number)))
    opened = preprocess(tmp_path / "cache", tiny_2b, clips, size=SIZE)
    assert [(row["tokens"], row["truncated"]) for row in opened.rows] == [(226, False), (227, True)]


def replace(path, table):
    """Such as a hostile hand would write it: the digest is right."""
    digest = hashlib.sha256(b"".join(map(canonical_json, table.to_pylist()))).hexdigest().encode()
    pq.write_table(table.replace_schema_metadata({b"rows_sha256": digest}), path)


DAMAGES = {
    "no parquet": lambda path: path.write_bytes(b"no parquet at all"),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "no digest": lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata(), path),
    "other columns": lambda path: replace(path, pq.read_table(path).drop_columns("verdicts")),
    "other types": lambda path: replace(path, pa.table({"source": [1]})),
    "probe": lambda path: replace(path, with_column(pq.read_table(path), "probe", '{"time_base": [1, 0]}')),
    "probe that is no object": lambda path: replace(path, with_column(pq.read_table(path), "probe", "[]")),
    "verdicts": lambda path: replace(path, with_column(pq.read_table(path), "verdicts", '{"probe": 1}')),
    "nulls": lambda path: replace(path, with_column(pq.read_table(path), "verdicts", None)),
}


def with_column(table, name, value):
    column = pa.array([value] * len(table), table.schema.field(name).type)
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_memory_of_sources_is_one_line(cache, mishaps, tiny_2b, capsys, damage):
    DAMAGES[damage](cache / "sources.parquet")
    flags = ["--cache", cache, "--pretrained_model_name_or_path", tiny_2b, "--dataset_name", mishaps, *SIZE]
    with pytest.raises(SystemExit) as end:
        run_command(main, [str(flag) for flag in flags])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {cache}/sources.parquet: ")
    assert "remove it" in line
    (cache / "sources.parquet").unlink()
    assert len(reject(cache, tiny_2b, mishaps).rows) > 2


def test_a_flipped_bit_in_the_memory_of_sources_is_refused_or_harmless(cache):
    path = cache / "sources.parquet"
    good, whole = path.read_bytes(), list(known_sources(Storage(str(cache))))
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(good), 60):
        bad = bytearray(good)
        bad[place] ^= 16
        path.write_bytes(bad)
        try:
            assert list(known_sources(Storage(str(cache)))) == whole
        except CacheError:
            refused += 1
    assert refused > 15


def test_a_video_that_changes_while_it_is_read_is_rejected_once(clips, tiny_2b, tmp_path, monkeypatch):
    """Its key names the bytes that were digested: other pixels must not get under it."""
    old = (clips / "1.mp4").read_bytes()

    class Meddling(InProcessPool):
        def read(self, path, *arguments, **options):
            if path.endswith("1.mp4"):
                write_video(clips / "1.mp4", moving_square(50, 9, 48, 72))
            return super().read(path, *arguments, **options)

    monkeypatch.setattr(pipeline, "DecodePool", Meddling)
    first = preprocess(tmp_path / "cache", tiny_2b, clips, size=SIZE)
    assert told(first) == {"0.mp4": None, "1.mp4": "unreadable"}
    assert "changed" in first.rejected[0]["detail"]
    monkeypatch.setattr(pipeline, "DecodePool", InProcessPool)
    second = preprocess(tmp_path / "cache", tiny_2b, clips, size=SIZE)
    assert told(second) == {"0.mp4": None, "1.mp4": None}
    (clips / "1.mp4").write_bytes(old)
    third = preprocess(tmp_path / "cache", tiny_2b, clips, size=SIZE)
    assert third.encoded == (1, 0)
    assert third.rows[1]["latent_key"] != second.rows[1]["latent_key"]


def test_a_video_that_goes_after_the_manifest_was_read_is_one_line(clips, tiny_2b, tmp_path, monkeypatch):
    real = pipeline.read_manifest

    def read_and_remove(config, spool):
        digest = real(config, spool)
        (clips / "1.mp4").unlink()
        return digest

    monkeypatch.setattr(pipeline, "read_manifest", read_and_remove)
    with pytest.raises(ManifestError, match=r"1\.mp4: cannot be read \(No such file"):
        preprocess(tmp_path / "cache", tiny_2b, clips, size=SIZE)


@pytest.mark.parametrize("task", ["digest", "probe", "read"])
def test_a_video_that_goes_during_the_run_is_rejected_and_taken_when_it_is_back(
    clips, tiny_2b, tmp_path, monkeypatch, task
):
    aside = tmp_path / "aside.mp4"
    (clips / "1.mp4").rename(aside)
    shutil.copy2(aside, clips / "1.mp4")

    def gone(path):
        if path.endswith("1.mp4"):
            (clips / "1.mp4").unlink(missing_ok=True)
        return path

    class Unplugged(InProcessPool):
        def probe(self, path):
            return super().probe(gone(path) if task == "probe" else path)

        def read(self, path, *arguments, **options):
            return super().read(gone(path) if task == "read" else path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "DecodePool", Unplugged)
        real = files.digest
        patch.setattr(files, "digest", lambda path: real(gone(path) if task == "digest" else path))
        first = preprocess(tmp_path / "cache", tiny_2b, clips, size=SIZE)
    assert told(first) == {"0.mp4": None, "1.mp4": "unreadable"}
    shutil.copy2(aside, clips / "1.mp4")  # with its old modification time
    assert told(preprocess(tmp_path / "cache", tiny_2b, clips, size=SIZE)) == {"0.mp4": None, "1.mp4": None}


def test_verdicts_are_saved_now_and_then_on_the_way(cache, tmp_path, monkeypatch):
    def verdicts():
        return next(known.verdicts for known in known_sources(Storage(str(cache))) if known.path == source.path)

    source = next(one for one in known_sources(Storage(str(cache))) if one.probe is not None and one.is_unchanged())
    error = VideoError("timed_out", "not done in 1 s")
    with Spool() as spool:
        learning = Sources(Cache(str(cache)), spool, tmp_path)
        learning.reject(source, bytes(16), error)
        assert bytes(16).hex() not in verdicts()
        learning._save_at = 0.0
        learning.reject(source, bytes(16), error)
        assert verdicts()[bytes(16).hex()] == ("timed_out", error.detail)
        count = len(list(known_sources(Storage(str(cache)))))
        learning.save()
    assert len(list(known_sources(Storage(str(cache))))) == count > 1, "the others stay"


def test_a_stand_in_decoder_reads_as_the_real_one_does(clips):
    """What the tests here and in test_never_*.py take for granted."""
    path, placement = str(clips / "0.mp4"), Placement(32, 48, 0, 0, 32, 48)
    with DecodePool(1, 60) as real:
        stand_in = InProcessPool(1, 60)
        probe = real.probe(path).result()
        assert stand_in.probe(path).result() == probe
        one, other = (
            pool.read(path, probe, range(9), placement, preview=True).result()
            for pool in (SimpleNamespace(read=real.read), stand_in)
        )
    np.testing.assert_array_equal(one.frames, other.frames)
    assert one.preview == other.preview

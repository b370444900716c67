"""The manifest, on real files: the independent reference is what the test itself wrote, by csv, json or pyarrow."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preprocess import manifest
from preprocess.manifest import Record, iter_manifest
from shared.errors import ManifestError, UserError
from shared.prompts import caption_prompt

CAPTIONS = ["a dog, running", 'he says "hi", then\nleaves', "NA", "a 🦊 in the snow", "null"]
NAMES = ["a.mp4", "b c.mp4", "ü/ñ.x.y.mov", "deep/er/a.mp4", "-e.webm"]
SHARED_CLIPS = Path(__file__).parents[2] / "shared" / "clips"


@pytest.fixture
def root(tmp_path):
    """A folder of videos, NAMES below it."""
    for name in NAMES:
        add_video(tmp_path / "data" / name)
    return tmp_path / "data"


def add_video(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"not decoded here: {path.name}".encode())
    return path


def read(dataset_name=None, *, instance_data_root=None, caption_column="caption", video_column="video", **settings):
    names = [None if name is None else str(name) for name in (dataset_name, instance_data_root)]
    return list(
        iter_manifest(
            dataset_name=names[0],
            instance_data_root=names[1],
            caption_column=caption_column,
            video_column=video_column,
            **settings,
        )
    )


def read_text_files(root):
    return read(instance_data_root=root, caption_column="prompts.txt", video_column="videos.txt")


def pairs(records):
    return [(record.source, record.caption) for record in records]


def write_table(path: Path, rows: list[dict]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def table_rows(**columns):
    return [
        {"video": name, "caption": caption, "other": 7, **columns}
        for name, caption in zip(NAMES, CAPTIONS, strict=True)
    ]


def write_one(root, **row):
    """A table of one clip, as JSONL."""
    return write_table(root / "metadata.jsonl", [{"video": "a.mp4", "caption": "a dog", **row}])


def test_two_text_files_give_one_record_a_line(root):
    captions = [caption.replace("\n", " ") for caption in CAPTIONS]
    (root / "prompts.txt").write_bytes("\r\n".join(captions).encode("utf-8-sig"))
    (root / "videos.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")

    records = read_text_files(root)

    assert pairs(records) == list(zip(NAMES, captions, strict=True))
    assert records[1] == Record(
        NAMES[1], str(root / NAMES[1]), captions[1], None, None, 1.0, f"{root / 'videos.txt'}:2"
    )


def test_unequal_counts_name_both_and_the_first_line_too_many(root):
    (root / "prompts.txt").write_text("one\ntwo\n")
    (root / "videos.txt").write_text("a.mp4\nb c.mp4\nü/ñ.x.y.mov\n-e.webm\n", encoding="utf-8")
    with pytest.raises(ManifestError, match=r"prompts.txt has 2 lines .* has 4;.*/videos.txt:3: 'ü/ñ.x.y.mov'"):
        read_text_files(root)


@pytest.mark.parametrize("blank", ["\n", "  \t\n"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("file", ["prompts.txt", "videos.txt"])
def test_a_blank_line_is_an_error_and_never_dropped(root, file, place, blank):
    for name in ("prompts.txt", "videos.txt"):
        lines = ["a.mp4\n", "a.mp4\n"]
        if name == file:
            lines.insert(place, blank)
        (root / name).write_text("".join(lines))
    with pytest.raises(ManifestError, match=rf"{file}:{place + 1}: .*blank"):
        read_text_files(root)


def test_a_text_file_that_is_missing_is_named_with_its_flag(root):
    (root / "prompts.txt").write_text("one\n")
    with pytest.raises(ManifestError, match=r"videos.txt: no such file; .* --video_column"):
        read_text_files(root)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".CSV"])
@pytest.mark.parametrize("given_as", ["file", "folder"])
def test_a_table_gives_its_rows_in_order(root, suffix, given_as):
    table = write_table(root / f"metadata{suffix.lower()}", table_rows())
    table = table.rename(table.with_suffix(suffix))

    records = read(table if given_as == "file" else root)

    assert pairs(records) == list(zip(NAMES, CAPTIONS, strict=True))
    assert [record.path for record in records] == [str(root / name) for name in NAMES]
    assert all((record.start_s, record.end_s, record.weight) == (None, None, 1.0) for record in records)


def test_json_lines_may_be_named_json(root):
    table = write_table(root / "clips.jsonl", table_rows())
    assert pairs(read(table.rename(root / "clips.json"))) == list(zip(NAMES, CAPTIONS, strict=True))


def test_columns_may_have_any_name_and_paths_another_root(root, tmp_path):
    table = write_table(tmp_path / "t.csv", [{"text": "a dog", "file_name": "a.mp4"}])
    records = read(table, instance_data_root=root, caption_column="text", video_column="file_name")
    assert [record.path for record in records] == [str(root / "a.mp4")]


def test_the_guides_triple_quoted_cells_lose_one_pair_of_quotes(root):
    (root / "metadata.csv").write_text('video,caption\n"""a.mp4""","""A ""big"" dog, running."""\n')
    assert pairs(read(root)) == [("a.mp4", 'A "big" dog, running.')]


@pytest.mark.parametrize(
    ("cell", "caption"),
    [
        ('"a dog"', "a dog"),
        ('""hi" she says"', '"hi" she says'),
        ('"he says "hi""', 'he says "hi"'),
        ('"two\nlines"', "two\nlines"),
        ('"Stop" is on one sign, on the other "Go"', '"Stop" is on one sign, on the other "Go"'),
        ('a "dog"', 'a "dog"'),
        ("'a dog'", "'a dog'"),
        ('"', '"'),
        ("  spaces stay ", "  spaces stay "),
    ],
)
def test_one_outer_pair_of_quotes_is_stripped(root, cell, caption):
    assert pairs(read(write_one(root, caption=cell))) == [("a.mp4", caption)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_segments_and_weights_are_taken_from_their_columns(root, suffix):
    as_cell = str if suffix == ".csv" else float
    rows = table_rows(start=as_cell(0.5), end_s=as_cell(2), weight=as_cell(3))
    rows[1].update(dict.fromkeys(("start", "end_s", "weight"), "" if suffix == ".csv" else None))
    records = read(write_table(root / f"t{suffix}", rows))
    assert [(record.start_s, record.end_s, record.weight) for record in records[:2]] == [(0.5, 2, 3), (None, None, 1)]


CAPTION = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() and not (text[0] == '"' == text[-1])
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.lists(CAPTION, min_size=1, max_size=6), suffix=st.sampled_from([".csv", ".tsv", ".json", ".jsonl"]))
def test_any_caption_survives_the_table(root, captions, suffix):
    table = write_table(root / f"any{suffix}", [{"caption": caption, "video": "a.mp4"} for caption in captions])
    assert [record.caption for record in read(table)] == captions


def test_a_folder_of_pairs_is_read_at_any_depth_in_the_order_of_paths(root):
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (root / name).with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    add_video(root / ".hidden" / "x.mp4")

    records = read(root)

    assert pairs(records) == sorted(zip(NAMES, CAPTIONS, strict=True))
    assert records[0].origin == f"{root / '-e.txt'}:1"


def test_a_pair_that_lacks_one_side_is_named(root):
    for name in NAMES[1:]:
        (root / name).with_suffix(".txt").write_text("a dog")
    with pytest.raises(ManifestError, match=r"data/a.mp4: has no text"):
        read(root)
    (root / "a.txt").write_text("a dog")
    (root / "deep" / "z.txt").write_text("nothing beside")
    with pytest.raises(ManifestError, match=r"deep/z.txt: has no video"):
        read(root)


def test_a_linked_folder_of_pairs_is_refused_unless_links_are_followed(root, tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "deep").symlink_to(root / "deep" / "er")
    (root / "deep" / "er" / "a.txt").write_text("a dog")
    with pytest.raises(ManifestError, match=r"pairs/deep: is a link .*--follow_links"):
        read(tmp_path / "pairs")
    assert pairs(read(tmp_path / "pairs", follow_links=True)) == [("deep/a.mp4", "a dog")]


def test_two_tables_in_one_folder_are_both_named(root):
    write_table(root / "a.csv", table_rows())
    write_table(root / "b.jsonl", table_rows())
    with pytest.raises(ManifestError, match=r"2 tables, 'a.csv', 'b.jsonl'"):
        read(root)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": ""}, r"the caption is empty \(''\)"),
        ({"caption": " \n"}, r"the caption is empty \(' \\n'\)"),
        ({"caption": '" "'}, r"the caption is empty"),
        ({"caption": None}, r"the caption is empty \(None\)"),
        ({"caption": 5}, r"the caption 5 is not text"),
        ({"video": None}, r"the video None is not a path"),
        ({"video": ""}, r"the video '' is not a path"),
        ({"video": {"bytes": "text"}}, r"the video None is not a path"),
        ({"video": "z.mp4"}, r"there is no file '.*/z.mp4'"),
        ({"video": "deep"}, r"there is no file '.*/deep'"),
        ({"video": "a\0.mp4"}, r"there is no file"),
        ({"video": "v" * 300 + ".mp4"}, r"there is no file"),
        ({"video": "../secret.mp4"}, r"'../secret.mp4' leaves the data root"),
        ({"video": "deep/../../secret.mp4"}, r"leaves the data root"),
        ({"video": "/etc/passwd"}, r"'/etc/passwd' leaves the data root"),
        ({"video": {"path": "/etc/passwd", "bytes": None}}, r"'/etc/passwd' leaves the data root"),
        ({"video": "pipe:cat a.mp4"}, r"pipe:... is a command"),
        ({"video": "PIPE: rm -r x |"}, r"PIPE:... is a command"),
        ({"video": "pipe://cat a.mp4"}, r"is a command"),
        ({"video": "simplecache::s3://bucket/a.mp4"}, r"chained URLs are refused"),
        ({"video": "zip://a.mp4::https://example.com/a.zip"}, r"chained URLs are refused"),
        ({"video": "file:///etc/passwd"}, r"file://...: .*write the plain path"),
        ({"video": "FILE:///etc/passwd"}, r"file://...: .*write the plain path"),
        ({"video": "local:///etc/passwd"}, r"local://...: is no store"),
        ({"video": "reference://a.mp4"}, r"reference://...: is no store"),
        ({"video": "s3://"}, r"names nothing"),
        ({"video": "s3://bucket/a/../b.mp4"}, r"holds '..'"),
        ({"video": "https://example.com/%2e%2e/b.mp4"}, r"holds '..'"),
        ({"video": "https://example.com/a.mp4?X-Amz-Signature=5"}, r"credentials and queries are refused"),
        ({"start": 2, "end": 2}, r"end = 2.0; must be greater than start = 2.0"),
        ({"end": 0}, r"end = 0.0; must be greater than start = 0"),
        ({"start": -1}, r"start = -1; must be a number from 0 to 1e\+09"),
        ({"start_s": "soon"}, r"start_s = 'soon'; must be a number"),
        ({"weight": math.nan}, r"weight = nan; must be a number"),
        ({"weight": math.inf}, r"weight = inf; must be a number"),
        ({"weight": 10**400}, r"weight = 1000*; must be a number"),
        ({"weight": -0.1}, r"weight = -0.1; must be a number"),
        ({"weight": 1e39}, r"weight = 1e\+39; must be a number from 0 to 1e\+09"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_with_its_value(root, row, message):
    add_video(root.parent / "secret.mp4")
    rows = [{"video": "a.mp4", "caption": "a dog"}, {"video": "a.mp4", "caption": "a dog", **row}]
    table = write_table(root / "metadata.jsonl", rows)
    with pytest.raises(ManifestError, match=rf"^{table}:2: .*{message}") as caught:
        read(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:hidden@bucket/a.mp4", "s3://hidden@bucket/a.mp4", "https://hidden@example.com/a.mp4",
        "https://me:hidden@example.com/a.mp4", "https://example.com/a.mp4?token=hidden",
        "simplecache::https://example.com/a.mp4?token=hidden", "HTTPS://me:hidden@example.com/a.mp4",
        "file://me:hidden@host/a.mp4", "nosuch://me:hidden@host/a.mp4",
    ],
)  # fmt: skip
def test_credentials_in_a_url_are_refused_and_not_told(root, url):
    with pytest.raises(UserError) as caught:
        read(write_one(root, video=url))
    assert "hidden" not in str(caught.value)
    for words in ({"dataset_name": url}, {"dataset_name": root / "metadata.jsonl", "instance_data_root": url}):
        with pytest.raises(UserError) as caught:
            read(**words)
        assert "hidden" not in str(caught.value)


def test_videos_may_be_urls_or_below_one(root):
    """None of them is asked for here."""
    url = "https://example.com/videos/a b.mp4"
    rows = [{"video": name, "caption": "a dog"} for name in (url, "a.mp4")]
    records = read(write_table(root / "t.csv", rows))
    assert [(record.source, record.path) for record in records] == [(url, url), ("a.mp4", str(root / "a.mp4"))]
    records = read(root / "t.csv", instance_data_root="s3://lab/videos/")
    assert [(record.source, record.path) for record in records] == [(url, url), ("a.mp4", "s3://lab/videos/a.mp4")]


@pytest.mark.parametrize("name", ["../a.mp4", "x/../../a.mp4", "..", "/etc/passwd", "."])
def test_a_name_does_not_leave_a_root_behind_a_url(root, name):
    with pytest.raises(ManifestError, match=rf"metadata.jsonl:1: '{name}' leaves the data root s3://lab/videos;"):
        read(write_one(root, video=name), instance_data_root="s3://lab/videos")


def test_half_a_surrogate_pair_is_not_a_caption(root):
    (root / "t.jsonl").write_text(r'{"video": "a.mp4", "caption": "\ud83d"}')
    with pytest.raises(ManifestError, match=r"t.jsonl:1: .* is not text"):
        read(root)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"video,text\na.mp4,x\n", r"t.csv: has no column 'caption' .*; its columns are 'video', 'text'"),
        ("t.csv", b"video,caption,caption\na.mp4,x,y\n", r"more than one column 'caption'"),
        ("t.csv", b"video,caption\na.mp4,x\n\na.mp4,a dog, running\n", r"t.csv:4: has 3 cells, the header 2"),
        ("t.csv", b'video,caption\na.mp4,"x\ny"\na.mp4\n', r"t.csv:4: has 1 cells"),
        ("t.csv", b'video,caption\na.mp4,x\na.mp4,"open\na.mp4,y\n', r"t.csv:3: .*close the quotes"),
        ("t.csv", b"video,caption\n", r"t.csv: holds no clips"),
        ("t.csv", b"", r"t.csv: has no column"),
        ("t.csv", b"video,caption\na.mp4,caf\xe9\n", r"t.csv: is not UTF-8"),
        ("t.jsonl", b'{"video": "a.mp4", "caption": "x"}\n{"video": \n', r"t.jsonl:2: is not JSON"),
        ("t.jsonl", b'{"video": "a.mp4"}\n', r"t.jsonl:1: has no column 'caption'"),
        ("t.jsonl", b"[1]\n", r"t.jsonl:1: \[1\] is not an object"),
        ("t.json", b'[{"video": "a.mp4", "caption": "x"}, 3]', r"t.json row 2: 3 is not an object"),
        ("t.json", b"[" * 100_000, r"t.json: is not JSON"),
        ("t.parquet", b"PAR1 and no more", r"t.parquet: cannot be read as Parquet"),
        ("t.txt", b"a dog", r"t.txt: is no table"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(root, name, content, message):
    (root / name).write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read(root / name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"no manifest: give --dataset_name"),
        ({"dataset_name": "no/such/folder/at/all"}, r"--dataset_name no/such/folder/at/all: no such file"),
        ({"dataset_name": "typo.csv"}, r"--dataset_name typo.csv: no such file"),
        ({"instance_data_root": "nowhere"}, r"nowhere: is no folder"),
        ({"dataset_name": "s3://lab/clips"}, r"s3://lab/clips: is no table; behind a URL"),
        ({"dataset_name": "file:///x/clips.csv"}, r"write the plain path"),
        ({"instance_data_root": "s3://lab/clips"}, r"--instance_data_root is a URL; give the table"),
    ],
)
def test_what_is_not_there_is_named_without_asking_the_hub(settings, message):
    with pytest.raises(UserError, match=message):
        read(**settings)


def test_an_empty_folder_holds_no_clips(tmp_path):
    with pytest.raises(ManifestError, match=r"holds no clips"):
        read(tmp_path)


def test_links_out_of_the_data_root_are_refused_unless_followed(root, tmp_path):
    outside = add_video(tmp_path / "outside" / "o.mp4")
    (root / "link.mp4").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    (root / "inner.mp4").symlink_to(root / "a.mp4")

    assert pairs(read(write_one(root, video="inner.mp4"))) == [("inner.mp4", "a dog")]
    for video in ("link.mp4", "folder/o.mp4"):
        table = write_one(root, video=video)
        with pytest.raises(ManifestError, match=r"leads out of the data root .*outside/o.mp4.*--follow_links"):
            read(table)
        assert [record.path for record in read(table, follow_links=True)] == [str(root / video)]
    with pytest.raises(ManifestError, match=r"leaves the data root"):
        read(write_one(root, video="../outside/o.mp4"), follow_links=True)


def test_a_root_that_is_itself_a_link_is_fine(root, tmp_path):
    (tmp_path / "linked").symlink_to(root)
    table = write_one(root, video=str(root / "a.mp4"))
    assert len(read(table, instance_data_root=tmp_path / "linked")) == 1


@pytest.mark.parametrize("given", ["data", "./data/", "other/../data", "other/../linked/data"])
def test_a_root_may_be_relative(root, tmp_path, monkeypatch, given):
    (tmp_path / "other").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_one(root, video="deep/er/../../a.mp4")
    (record,) = read(given)
    assert record.path == os.path.normpath(tmp_path / given / "a.mp4")
    with pytest.raises(ManifestError, match=r"leaves the data root"):
        read(write_one(root, video="../data.mp4"), instance_data_root=given)


def test_the_blobs_of_the_hubs_cache_may_be_linked_to_and_nothing_else(tmp_path):
    repository = tmp_path / "hub" / "datasets--owner--name"
    blob = add_video(repository / "blobs" / "0123abcd")
    snapshot = repository / "snapshots" / "main"
    (snapshot / "videos").mkdir(parents=True)
    (snapshot / "videos" / "a.mp4").symlink_to(os.path.relpath(blob, snapshot / "videos"))
    (snapshot / "videos" / "b.mp4").symlink_to(add_video(tmp_path / "hub" / "other" / "blobs" / "b"))

    (record,) = read(write_one(snapshot, video="videos/a.mp4"))

    assert record.path == str(snapshot / "videos" / "a.mp4")
    with pytest.raises(ManifestError, match=r"leads out of the data root"):
        read(write_one(snapshot, video="videos/b.mp4"))


def test_a_path_may_have_300_characters_and_any_script(root):
    name = "/".join(["長い 名前.v1"] * 35) + "/x.y z'.mp4"
    add_video(root / name)
    (record,) = read(write_one(root, video=name))
    assert record.path == str(root / name)
    assert len(name) > 300


def test_a_video_embedded_in_a_table_is_written_once_under_its_digest(root, tmp_path):
    rows = [{"caption": str(i), "video": {"bytes": b"clip %d" % (i % 2), "path": "same.mov"}} for i in range(3)]
    table = write_table(root / "t.parquet", rows)

    records = read(table, cache_dir=str(tmp_path / "cache"))

    assert [Path(record.path).read_bytes() for record in records] == [b"clip 0", b"clip 1", b"clip 0"]
    assert records[1].source == hashlib.sha256(b"clip 1").hexdigest() + ".mov"
    assert {path.name for path in (tmp_path / "cache" / "videos").iterdir()} == {record.source for record in records}


def test_a_clone_of_a_hub_data_set_is_read_by_datasets(root, tmp_path):
    (tmp_path / "clone" / "data").mkdir(parents=True)
    (tmp_path / "clone" / "README.txt").write_text("no caption")
    write_table(tmp_path / "clone" / "data" / "train.csv", table_rows(start=1.5))

    records = read(tmp_path / "clone", instance_data_root=root, cache_dir=str(tmp_path / "cache"))

    assert pairs(records) == list(zip(NAMES, CAPTIONS, strict=True))
    assert records[2].start_s == 1.5
    assert records[2].origin == f"{tmp_path / 'clone'} row 3"
    with pytest.raises(ManifestError, match=r"clone: has no column 'text' .*'video', 'caption'"):
        read(tmp_path / "clone", caption_column="text", cache_dir=str(tmp_path / "cache"))


def test_a_configuration_of_a_hub_data_set_is_chosen_by_name(root, tmp_path):
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    for name, row in (("cats", table_rows()[0]), ("dogs", table_rows()[1])):
        write_table(clone / "data" / f"{name}.csv", [row])
    configs = "".join(f"- config_name: {name}\n  data_files: data/{name}.csv\n" for name in ("cats", "dogs"))
    (clone / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for number, name in enumerate(("cats", "dogs")):
        chosen = {"dataset_config_name": name, "cache_dir": str(tmp_path / "cache")}
        assert pairs(read(clone, instance_data_root=root, **chosen)) == [(NAMES[number], CAPTIONS[number])]


def test_a_video_feature_of_the_hub_is_not_decoded_and_named_alike_on_every_machine(root, tmp_path, monkeypatch):
    columns = {"clip": [str(root / name) for name in NAMES], "caption": CAPTIONS}
    dataset = datasets.Dataset.from_dict(columns).cast_column("clip", datasets.Video())
    monkeypatch.setattr(manifest, "load_hub", lambda *_: (dataset, root))

    records = read(
        "owner/name", instance_data_root=add_video(tmp_path / "elsewhere" / "a.mp4").parent, video_column="clip"
    )

    assert pairs(records) == list(zip(NAMES, CAPTIONS, strict=True))
    assert [record.path for record in records] == columns["clip"]


def test_a_hub_data_set_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    def fail(*_args, **_settings):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(ManifestError, match=r"--dataset_name owner/name: .*offline"):
        read("owner/name")


def test_local_tables_need_neither_torch_nor_datasets(root):
    """Importing them takes seconds, and a second run of stage 1 has three in all."""
    table = write_table(root / "t.parquet", table_rows())
    code = (
        "import sys; from preprocess.manifest import iter_manifest as read;"
        f"assert list(read(dataset_name={str(table)!r}, instance_data_root=None, caption_column='caption', "
        "video_column='video')); print({'torch', 'datasets', 'pandas'} & set(sys.modules))"
    )
    checkout = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("caption", "id_token", "prompt"),
    [
        ("a dog", None, "a dog"),
        ("a dog", " ", "a dog"),
        ("a dog", "BW_STYLE", "BW_STYLE a dog"),
        (" a dog", " BW ", "BW  a dog"),
    ],
)
def test_the_id_token_goes_before_the_caption_with_one_space(caption, id_token, prompt):
    assert caption_prompt(caption, id_token) == prompt


@pytest.mark.skipif(not SHARED_CLIPS.exists(), reason="../shared/clips is not here")
def test_real_clips_are_found_from_a_table_elsewhere(tmp_path):
    table = write_table(tmp_path / "clips.csv", [{"video": "hiker.mp4", "caption": "a hiker"}])
    assert read(table, instance_data_root=SHARED_CLIPS)[0].path == str(SHARED_CLIPS / "hiker.mp4")

"""`preview.html` of a data set version, in a browser; what cannot be read is told and loses nothing."""

import csv
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

import fsspec
import pyarrow.parquet as pq
import pytest

from preprocess import preview
from preprocess.__main__ import main as preprocess
from preprocess.preview import main
from shared.cache import Cache
from shared.dataset import SAMPLES_SCHEMA, open_dataset, publish_dataset
from shared.errors import CacheError, ConfigError
from tests.chromium import chromium, needs_chromium
from tests.conftest import moving_square, write_video
from tests.decoding import use_stand_ins

CARDS = "[...document.querySelectorAll('.sample:not([hidden])')]"
SHOWN = f"{CARDS}.map((card) => card.querySelector('code').textContent)"  # the ids of the samples that are seen
WIDTH = "document.documentElement.scrollWidth"
ARABIC, LONG = "שלום עולם, a street; مرحبا بالعالم", 9
CAPTIONS = [
    "<script>document.title = 'stolen'</script>",
    "</script><img src=x onerror=\"document.title = 'stolen'\">",
    "</style></main></body></html> <!-- <![CDATA[",
    "\"double\" 'single' &amp; & &lt;b&gt; `${document.title = 'stolen'}` {{ 7 * 7 }} {% raw %}",
    "a line\u2028and a paragraph\u2029 in JavaScript",
    ARABIC,
    "\u202ereversed to the end",
    "👩‍👩‍👧 on a 🏔️, ℌ𝔢𝔩𝔩𝔬",
    "w" * 3000,
    "a street " * 150,
    "a plain STREET at night",
    "a street at night",
]


def page_of(cache):
    (page,) = cache.glob("datasets/squares/versions/*/preview.html")
    return page


def opened(cache):
    return open_dataset(Cache(str(cache)), "squares")


def rows_of(cache):
    """The rows of samples.parquet, and of rejected.parquet."""
    folder = cache / opened(cache).folder
    return (pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("samples", "rejected"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, tiny_2b):
    """A cache of clips whose captions and names are a trial for a page; three clips are rejected. Not to be changed."""
    folder = tmp_path_factory.mktemp("hostile")
    write_video(folder / "tall & <b>wide.mp4", moving_square(1, 9, 104, 72))
    write_video(folder / "a.mp4", moving_square(2))
    write_video(folder / "short <i>.mp4", moving_square(3, 4))
    (folder / "\u202etext.mp4").write_text("no video")
    with (folder / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "text"])
        rows.writerows((("a.mp4", "tall & <b>wide.mp4")[place % 3 == 0], text) for place, text in enumerate(CAPTIONS))
        rows.writerows([("short <i>.mp4", CAPTIONS[0]), ("short <i>.mp4", CAPTIONS[8])])
        rows.writerow(["\u202etext.mp4", CAPTIONS[1]])
    words = ["--cache", folder / "cache", "--dataset", "squares", "--pretrained_model_name_or_path", tiny_2b]
    words += ["--dataset_name", folder / "clips.csv", "--video_column", "file", "--caption_column", "text"]
    with pytest.MonkeyPatch.context() as patch:
        use_stand_ins(patch)
        assert preprocess([str(word) for word in (*words, "--buckets", "9x64x96,9x96x64", "--id_token", "SQR")]) == 0
    return folder / "cache"


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests here: it takes seconds to start."""
    with chromium() as browser:
        yield browser


# In a browser.


@needs_chromium
def test_a_browser_shows_strips_and_filters_them_on_desk_and_phone(browser, cache, tmp_path):
    browser.complaints.clear()
    for width, height in ((1280, 900), (390, 844)):
        browser.resize(width, height)
        browser.open(page_of(cache))
        assert browser.complaints == []
        assert browser.ask(WIDTH) == width
        assert len(browser.ask(SHOWN)) == 7
        browser.wait_until("document.querySelector('img.strip').naturalWidth > 0")
        browser.ask("document.querySelector('.rows [data-bucket=\"9x96x64\"]').click()")
        assert len(browser.ask(SHOWN)) == 2
        browser.screenshot(tmp_path / f"{width}.png")


@needs_chromium
def test_the_filters_show_the_cards_that_they_ask_for(browser, hostile):
    rows, _ = rows_of(hostile)
    browser.complaints.clear()
    browser.resize(1280, 900)
    browser.open(page_of(hostile))

    def shown(text="", bucket="", truncated=False):
        """What the page shows once the filters are set as a hand would set them."""
        browser.ask("document.getElementById('text').select()")
        browser.call("Input.insertText", text=text) if text else browser.call(
            "Input.dispatchKeyEvent", type="keyDown", key="Delete", windowsVirtualKeyCode=46
        )
        browser.ask(
            f"bucket.value = {bucket!r}; bucket.dispatchEvent(new Event('input'));"
            f"truncated.checked === {str(truncated).lower()} || truncated.click()"
        )
        found = browser.ask(SHOWN)
        told = f"{len(rows)} samples" if len(found) == len(rows) else f"{len(found)} of {len(rows)}"
        assert browser.ask("document.getElementById('count').value") == told
        return found

    def wanted(text="", bucket="", truncated=False):
        words = text.casefold().split()
        return [
            row["sample_id"]
            for row in rows
            if all(word in f"SQR {row['caption']} {row['source']}".casefold() for word in words)
            and bucket in ("", row["bucket"])
            and row["truncated"] >= truncated
        ]

    assert sum(row["truncated"] for row in rows) == 1
    for text, count in (
        ("street", 4), ("Night  PLAIN", 1), ("wide.mp4", 4), ("& <b>", 4), ("ו", 1), ("🏔", 1), ("no such", 0), ("", 12),
    ):  # fmt: skip
        assert shown(text) == wanted(text)
        assert len(wanted(text)) == count, text
        assert shown(text, "9x96x64") == wanted(text, "9x96x64")
        assert shown(text, truncated=True) == wanted(text, truncated=True)
    assert shown(truncated=True) == [rows[LONG]["sample_id"]]
    assert browser.complaints == []


@needs_chromium
def test_hostile_captions_and_names_are_text(browser, hostile, tmp_path):
    rows, rejected = rows_of(hostile)
    browser.complaints.clear()
    browser.requests.clear()
    for width, height in ((1280, 900), (390, 844)):
        browser.resize(width, height)
        browser.open(page_of(hostile))
        browser.ask("for (const card of document.querySelectorAll('.sample')) card.style.contentVisibility = 'visible'")
        browser.screenshot(tmp_path / f"{width}.png")
        assert browser.ask(WIDTH) == width, "nothing sticks out"
        assert browser.ask(f"{CARDS}.filter((card) => card.scrollWidth > card.clientWidth).length") == 0
        assert browser.ask(f"Math.max(...{CARDS}.map((card) => card.offsetHeight))") < 600, "long captions scroll"
        assert browser.ask("document.title") == "squares · data set"
        told = browser.ask(f"{CARDS}.map((card) => card.querySelector('.caption').textContent)")
        assert told == [f"SQR {row['caption']}" for row in rows]
        assert browser.ask(f"{CARDS}.map((card) => card.querySelector('.source').textContent)") == [
            row["source"] for row in rows
        ]
        assert browser.ask("document.querySelectorAll('script').length") == 1
        assert browser.ask("document.querySelectorAll('img:not(.strip), .sample b, .sample i').length") == 0
        red = browser.ask("[...document.querySelectorAll('.sample .bad')].map((tag) => tag.textContent)")
        assert red == [f"{rows[LONG]['tokens']} tokens, 226 read"]
    right_to_left = f"{CARDS}.map((card) => getComputedStyle(card.querySelector('.caption')).direction === 'rtl')"
    assert [place for place, found in enumerate(browser.ask(right_to_left)) if found] == [CAPTIONS.index(ARABIC)]
    reasons = browser.ask("[...document.querySelectorAll('.reasons tr')].map((row) => row.innerText)")
    assert [told.split()[:2] for told in reasons] == [["2", "too_short"], ["1", "unreadable"]]
    told = browser.ask("[...document.querySelectorAll('.refused li')].map((item) => item.textContent)")
    assert len(told) == len(rejected) == 3
    for item, row in zip(told, rejected, strict=True):
        assert [item.count(row[name]) >= 1 for name in ("source", "reason", "detail", "caption")] == [True] * 4
    assert browser.ask("document.querySelector('details').open"), "so few are seen at once"
    assert browser.complaints == []
    assert {request.partition(":")[0] for request in browser.requests} == {"file", "data"}


@needs_chromium
def test_all_pages_lead_to_each_other(browser, hostile, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "PAGE_SAMPLES", 5)
    cache = shutil.copytree(hostile, tmp_path / "cache")
    assert main([str(cache), "--dataset", "squares", "--all"]) == 0
    rows, _ = rows_of(cache)
    browser.complaints.clear()
    page, seen = page_of(cache), []
    way: list[Path] = []

    def follow(word):
        href = browser.ask(f"[...document.querySelectorAll('.pages a')].find((a) => a.textContent === {word!r})?.href")
        return href and Path(unquote(urlparse(href).path))

    while page:
        browser.open(page)
        assert browser.ask("document.querySelector('.pages span').textContent") == f"page {len(way) + 1} of 3"
        seen += browser.ask(SHOWN)
        way.append(page)
        page = follow("next")
    assert seen == [row["sample_id"] for row in rows]
    assert [page.name for page in way] == ["preview.html", "preview-2.html", "preview-3.html"]
    assert follow("previous") == way[1]
    browser.open(way[1])
    assert follow("previous") == way[0]
    assert browser.ask("document.querySelectorAll('.rows button:not([disabled])').length") == 2
    assert "Samples 6 to 10 of 12" in browser.ask("document.querySelector('footer').textContent")
    assert browser.complaints == []


# Which pages there are.


def links(page):
    return re.findall(r'<a href="(preview[^"]*)">', page.read_text())


def test_a_first_page_that_is_made_alone_keeps_the_links_to_those_beside_it(cache_copy, monkeypatch):
    monkeypatch.setattr(preview, "PAGE_SAMPLES", 3)
    command = [str(cache_copy), "--dataset", "squares"]
    assert main(command) == 0
    assert links(page_of(cache_copy)) == []
    assert "--all</code>" in page_of(cache_copy).read_text()
    assert main([*command, "--all"]) == 0
    assert links(page_of(cache_copy)) == ["preview-2.html"] * 2
    whole = page_of(cache_copy).read_bytes()
    page_of(cache_copy).unlink()
    assert main(command) == 0
    assert page_of(cache_copy).read_bytes() == whole
    root = Cache(str(cache_copy))
    with root.writer() as writer:
        preview.write_preview(root, writer, opened(cache_copy))
    assert page_of(cache_copy).read_bytes() == whole
    (page_of(cache_copy).parent / "preview-3.html").unlink()
    assert main(command) == 0
    assert links(page_of(cache_copy)) == []


def test_a_run_that_is_broken_off_leaves_no_link_that_leads_nowhere(cache_copy, monkeypatch):
    monkeypatch.setattr(preview, "PAGE_SAMPLES", 3)
    before, render = page_of(cache_copy).read_bytes(), preview.render

    def broken(dataset, census, rows, strips, place, decoded):
        if place.number == 3:
            raise KeyboardInterrupt
        return render(dataset, census, rows, strips, place, decoded)

    monkeypatch.setattr(preview, "render", broken)
    with pytest.raises(KeyboardInterrupt):
        main([str(cache_copy), "--dataset", "squares", "--all"])
    assert page_of(cache_copy).read_bytes() == before


def test_a_folder_of_pages_holds_no_others_afterwards(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preview, "PAGE_SAMPLES", 3)
    command = [str(cache), "--dataset", "squares", "--output", str(tmp_path / "pages")]
    assert main([*command, "--all"]) == 0
    mine = tmp_path / "pages" / "preview-notes.html"
    mine.write_text("mine")
    assert {path.name for path in mine.parent.iterdir()} == {
        "preview.html", "preview-2.html", "preview-3.html", mine.name,
    }  # fmt: skip
    assert capsys.readouterr().out.count("open it in a browser") == 3
    assert main(command) == 0
    assert {path.name for path in mine.parent.iterdir()} == {"preview.html", mine.name}
    assert links(tmp_path / "pages" / "preview.html") == []


def test_pages_in_a_folder_leave_the_cache_as_it_is(cache_copy, tmp_path):
    shutil.rmtree(cache_copy / "writers")
    before = {path: path.stat().st_mtime_ns for path in cache_copy.rglob("*")}
    assert main([str(cache_copy), "--dataset", "squares", "--output", str(tmp_path / "pages")]) == 0
    assert {path: path.stat().st_mtime_ns for path in cache_copy.rglob("*")} == before
    assert (tmp_path / "pages" / "preview.html").read_bytes() == page_of(cache_copy).read_bytes()


def test_a_page_that_cannot_be_written_is_one_line(cache, tmp_path):
    (tmp_path / "preview.html").mkdir()
    with pytest.raises(CacheError, match=r"preview\.html: cannot be written \(Is a directory\); make room, or"):
        main([str(cache), "--dataset", "squares", "--output", str(tmp_path)])


def test_an_output_behind_a_url_is_refused(cache):
    with pytest.raises(ConfigError, match="--output s3://lab/pages: a URL; must be a folder of this machine"):
        main([str(cache), "--dataset", "squares", "--output", "s3://lab/pages"])


def test_a_version_that_is_not_the_current_one_has_a_page_of_its_own(cache_copy, monkeypatch):
    old = opened(cache_copy)
    root, rows = Cache(str(cache_copy)), list(old.rows(*SAMPLES_SCHEMA.names))
    told = {name: value for name, value in old.info.items() if name not in ("name", "digest", "samples")}
    with root.writer() as writer:
        new = publish_dataset(root, writer, "squares", told, rows[:4], [], dict)
    assert opened(cache_copy).digest == new
    (cache_copy / old.folder / "preview.html").unlink()
    monkeypatch.setattr(preview, "PAGE_SAMPLES", 6)
    assert main([str(cache_copy), "--dataset", "squares", "--version", old.digest[:8]]) == 0
    html = page_of(cache_copy).read_text()
    assert not (cache_copy / opened(cache_copy).folder / "preview.html").exists()
    assert html.count('<article class="sample') == 6
    assert "Samples 1 to 6 of 7;" in html
    assert f"preprocess.preview {cache_copy} --dataset squares --version {old.digest[:12]} --all</code>" in html


# What is read.


def test_a_remote_cache_has_the_page_of_a_local_one(cache, monkeypatch):
    system = fsspec.filesystem("memory")
    system.put(str(cache), "/preview/cache", recursive=True)
    name = f"/preview/cache/{page_of(cache).relative_to(cache)}"
    system.rm_file(name)
    assert main(["memory://preview/cache", "--dataset", "squares"]) == 0
    assert system.cat_file(name) == page_of(cache).read_bytes()
    assert page_of(cache).read_text().count("data:image/jpeg;base64,") == 7
    monkeypatch.setattr(preview, "PAGE_SAMPLES", 3)
    assert main(["memory://preview/cache", "--dataset", "squares", "--all"]) == 0
    assert len(system.glob(name.replace("preview.html", "preview*.html"))) == 3
    assert main(["memory://preview/cache", "--dataset", "squares"]) == 0
    assert b'<a href="preview-2.html">' in system.cat_file(name)


def test_a_part_that_is_gone_is_told_on_the_page(cache_copy):
    for tar in cache_copy.glob("latents/*/*.tar"):
        tar.unlink()
    assert main([str(cache_copy), "--dataset", "squares"]) == 0
    assert page_of(cache_copy).read_text().count("no strip: ") == 7

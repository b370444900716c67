"""`preview.html` of a data set version, in a browser; what cannot be read is told and loses nothing."""

import re

import numpy as np

from preprocess.preview import main
from preprocess.reconstruction import peak_signal_to_noise
from tests.chromium import chromium, needs_chromium

SHOWN = "document.querySelectorAll('.sample:not([hidden])').length"


def page_of(cache):
    (page,) = cache.glob("datasets/squares/versions/*/preview.html")
    return page


@needs_chromium
def test_a_browser_shows_strips_and_filters_them_on_desk_and_phone(cache, tmp_path):
    with chromium() as browser:
        for width, height in ((1280, 900), (390, 844)):
            browser.resize(width, height)
            browser.open(page_of(cache))
            assert browser.complaints == []
            assert browser.ask("document.documentElement.scrollWidth") == width
            assert browser.ask(SHOWN) == 7
            browser.wait_until("document.querySelector('img.strip').naturalWidth > 0")
            browser.ask("document.querySelector('.rows [data-bucket=\"9x96x64\"]').click()")
            assert browser.ask(SHOWN) == 2
            browser.screenshot(tmp_path / f"{width}.png")


def test_a_part_that_is_gone_is_told_on_the_page(cache_copy):
    for tar in cache_copy.glob("latents/*/*.tar"):
        tar.unlink()
    assert main([str(cache_copy), "--dataset", "squares"]) == 0
    assert page_of(cache_copy).read_text().count("no strip: ") == 7


def test_reconstructions_have_their_psnr(cache_copy, tmp_path):
    assert main([str(cache_copy), "--dataset", "squares", "--decode", "2", "--output", str(tmp_path / "out")]) == 0
    told = re.findall(r"PSNR ([\d.]+) dB", (tmp_path / "out" / "preview.html").read_text())
    assert len(told) == 2
    black, grey = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 51, np.uint8)
    assert round(peak_signal_to_noise(black, grey), 4) == 13.9794  # 20 log10(255 / 51)

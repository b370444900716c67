"""`index.html` of a folder of videos, in a browser."""

import json

import pytest

from infer.gallery import write_gallery
from tests.chromium import chromium, needs_chromium
from tests.conftest import moving_square, write_video

EVIL = "<script>document.title = 'stolen'</script>"


@pytest.fixture
def videos(tmp_path):
    lora = {"path": "/runs/mine/pytorch_lora_weights.safetensors", "weight": 0.5, "latentreel": {"step": 20}}
    for name, scale in (("a", 1.0), ("b", 0.0)):
        recipe = {"prompt": f"clouds {EVIL}", "effective_prompt": "", "seed": 7, "fps": 8, "frames": 9}
        (tmp_path / f"{name}.json").write_text(json.dumps({**recipe, "lora_scale": scale, "loras": [lora]}))
        write_video(tmp_path / f"{name}.mp4", moving_square(1))
    both = [{"name": "b", "label": "base"}, {"name": "a", "label": "LoRA 1"}]
    (tmp_path / "both.json").write_text(json.dumps({"prompt": f"clouds {EVIL}", "seed": 7, "fps": 8, "compare": both}))
    write_video(tmp_path / "both.mp4", moving_square(1))
    return tmp_path


@needs_chromium
def test_base_and_lora_play_side_by_side_and_the_command_is_copied(videos, tmp_path):
    page = write_gallery(videos)
    with chromium() as browser:
        for width, height in ((1280, 900), (390, 844)):
            browser.resize(width, height)
            browser.open(page)
            assert browser.ask("document.documentElement.scrollWidth") == width
            assert browser.ask("document.title") != "stolen"
            assert browser.ask("document.querySelectorAll('.group').length") == 1
            labels = browser.ask("[...document.querySelectorAll('figcaption b')].map((label) => label.textContent)")
            assert labels == ["base model", "mine, step 20, weight 0.5", "side by side: base, LoRA 1"]
            browser.ask("document.querySelector('.together').click()")
            browser.wait_until("[...document.querySelectorAll('video')].every((video) => video.readyState >= 2)")
            browser.ask("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
            browser.ask("document.querySelectorAll('.copy')[1].click()")
            wanted = f"python -m infer --recipe {videos / 'a.json'} --output_dir {videos}"
            assert browser.ask("window.copied") == wanted
            browser.screenshot(tmp_path / f"{width}.png")
        assert browser.complaints == []

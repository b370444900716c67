"""That a LoRA learns: a tiny transformer is trained from scratch, frozen, and tuned on a concept that it has not seen.

`python -m benchmarks.learning`: generated clips, the trainer's own objective, the three stages as a user runs them.
`make bench` runs the short form, with fewer clips and steps. docs/learning.md says what came out.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.shapes import FRAMES, ID_TOKEN, SIDE, Scene, scenes, write_clips
from benchmarks.stages import run
from benchmarks.table import show
from shared.cache import Cache
from shared.dataset import DataSet, open_dataset
from shared.lora import TARGET_MODULES, add_lora, find_lora, load_lora_state
from shared.models import Checkpoint, load_transformer, open_checkpoint
from tests import tiny_model
from train.data import DrawSettings, LatentDataset, Requests, Samples, micro_batches
from train.holdout import DRAWS, HeldOut, held_out_loss, split_sources
from train.objective import alphas_cumprod, batch_loss
from train.sampler import Deal, Sampler

SEED = 0
HOLDOUT = 0.2  # share of the clips that neither pre-training nor the LoRA is trained on
LOGVAR = -8.0  # of the VAE's posterior, whatever the clip: a trained one's is as narrow
TEXT_LENGTH = 32  # tokens; the longest caption has fewer
RANK = 16
LEARNING_RATE = 3e-3  # of pre-training, at its peak
PRETRAIN_LIMIT, CONCEPT_LIMIT = 0.5, 0.85  # held-out loss after, over held-out loss before


@dataclass(frozen=True)
class Size:
    """How much is done."""

    clips: int
    pretrain_steps: int
    concept_clips: int
    lora_steps: int
    batch_size: int = 8


SHORT = Size(clips=150, pretrain_steps=500, concept_clips=25, lora_steps=100)
LONG = Size(clips=300, pretrain_steps=2000, concept_clips=25, lora_steps=300)


def main(short: bool = True) -> bool:
    """Measure and print; returns whether all figures are within their limits."""
    size = SHORT if short else LONG
    torch.set_num_threads(1)  # so small a transformer gains little from a second, and loses much where it is taken
    started, cpu_before = time.perf_counter(), sum(os.times()[:4])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model(folder / "model")
        preprocess(folder, model, "shapes", scenes("shapes", size.clips))
        plain = Pretraining.open(folder, model)
        untrained = plain.held_out_loss()
        plain.train(size)
        pretrained = plain.held_out_loss()
        plain.transformer.save_pretrained(model / "transformer")

        preprocess(
            folder, model, "concept", scenes("concept", size.concept_clips, concept=True), "--id_token", ID_TOKEN
        )
        first, *_, last = tune(folder, size)
        load_lora(plain.transformer, folder / "lora")
        tuned = plain.held_out_loss()
        base, off, on = (sample(folder, model, scale) for scale in (None, 0.0, 1.0))
    equal_off, equal_on = (sum(base[prompt] == frames[prompt] for prompt in base) for frames in (off, on))
    figures: list[tuple[str, float, float | None, str]] = [
        ("pre-training: held-out loss from scratch", untrained["loss"], None, ""),
        (f"pre-training: held-out loss after {size.pretrain_steps} steps", pretrained["loss"], None, ""),
        ("pre-training: after / before", pretrained["loss"] / untrained["loss"], PRETRAIN_LIMIT, ""),
        ("concept: held-out loss of the base", first["loss"], None, ""),
        (f"concept: held-out loss after {size.lora_steps} steps", last["loss"], None, ""),
        ("concept: after / before", last["loss"] / first["loss"], CONCEPT_LIMIT, ""),
        *(
            (f"concept: after / before, timesteps {250 * quarter} to {250 * quarter + 249}", after / before, None, "")
            for quarter, (before, after) in enumerate(zip(first["quartiles"], last["quartiles"], strict=True))
        ),
        ("pre-training clips: held-out loss, LoRA / base", tuned["loss"] / pretrained["loss"], None, ""),
        ("videos at --lora_scale 0 whose frames are not the base's", len(base) - equal_off, 0, f" of {len(base)}"),
        ("videos at --lora_scale 1 whose frames are the base's", equal_on, 0, f" of {len(base)}"),
        ("the whole", (time.perf_counter() - started) / 60, None, " min"),
        ("the whole, in CPU time", (sum(os.times()[:4]) - cpu_before) / 60, None, " min"),
    ]
    return show(f"learning: {size.clips} clips, then {size.concept_clips} of a concept", figures)


def build_model(folder: Path) -> Path:
    """A checkpoint of the 2B kind with a transformer worth training, and a VAE whose latents can be learned.

    A random VAE's posterior has a deviation of 1, three times that of its means: draws from it are noise. So the layer
    that says it is set to what training brings it to, a narrow one. `scaling_factor` is measured, as the real one was:
    scaled latents have a deviation of 1.
    """
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    tiny_model.build(folder, seed=SEED)
    tiny = json.loads((folder / "transformer" / "config.json").read_text())
    torch.manual_seed(SEED)
    transformer = CogVideoXTransformer3DModel(
        **{name: value for name, value in tiny.items() if not name.startswith("_")}
        | {
            "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "time_embed_dim": 64,
            "max_text_seq_length": TEXT_LENGTH, "sample_height": SIDE // 8, "sample_width": SIDE // 8,
            "sample_frames": FRAMES,
        }
    )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")

    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae")
    clips = np.stack([scene.frames() for scene in scenes("calibration", 48)])
    with torch.no_grad():
        pixels = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        last, channels = vae.encoder.conv_out.conv, vae.config.latent_channels
        last.weight[channels:], last.bias[channels:] = 0.0, LOGVAR
        latents = torch.cat([vae.encode(some).latent_dist.mean for some in pixels.split(8)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder / "vae")
    return folder


def preprocess(folder: Path, model: Path, dataset: str, chosen: list[Scene], *more: str) -> None:
    """Stage 1, on clips that are written first."""
    manifest = write_clips(folder / dataset, chosen)
    run(
        "-m", "preprocess", "--pretrained_model_name_or_path", str(model), "--dataset_name", str(manifest),
        "--cache", str(folder / "cache"), "--dataset", dataset, "--height", str(SIDE), "--width", str(SIDE),
        "--max_num_frames", str(FRAMES), *more,
    )  # fmt: skip


@dataclass(frozen=True)
class Pretraining:
    """All of a transformer, trained from scratch with the trainer's reader, order, draws and objective.

    Attributes:
        held: [N] bool, which samples are not trained on.
    """

    dataset: DataSet
    base: Checkpoint
    samples: Samples
    held: np.ndarray
    transformer: Any

    @classmethod
    def open(cls, folder: Path, model: Path) -> Pretraining:
        """Open the plain clips and the untrained transformer."""
        dataset = open_dataset(Cache(str(folder / "cache")), "shapes")
        base = open_checkpoint(str(model), revision=None, variant=None, cache_dir=None, weights=("transformer",))
        held = split_sources(dataset.columns("source")["source"].to_pylist(), HOLDOUT)
        transformer = load_transformer(base, torch.float32).requires_grad_(True).train()
        return cls(dataset, base, Samples(dataset), held, transformer)

    @property
    def schedule(self) -> torch.Tensor:
        """abar [1000]."""
        return alphas_cumprod(self.base.config("scheduler"))

    def train(self, size: Size) -> None:
        """Train: AdamW, one cycle of the learning rate."""
        facts, steps, batch_size = self.base.facts, range(size.pretrain_steps), size.batch_size
        draws = DrawSettings(SEED, batch_size, stratified=True, random_flip=0.0, caption_dropout=0.1)
        order = Sampler(self.samples.buckets, batch_size, self.dataset.digest, SEED, np.flatnonzero(~self.held))
        requests = Requests(self.samples, order, Deal(batch_size, 1, 1), 0, steps, draws)
        reader = LatentDataset(self.dataset, facts, draws)
        parameters, schedule = list(self.transformer.parameters()), self.schedule
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95))
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=len(steps), pct_start=0.1)
        with closing(micro_batches(reader, requests, num_workers=0, pin_memory=False)) as batches:
            for batch in batches:
                losses = batch_loss(self.transformer, batch, facts, schedule, torch.float32)
                ((losses * batch.weights).sum() / batch.weights.sum()).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                rate.step()

    def held_out_loss(self) -> dict[str, Any]:
        """As the trainer measures it, on the plain clips."""
        reader = LatentDataset(self.dataset, self.base.facts, DRAWS)
        told = SimpleNamespace(  # what is asked of a run
            accelerator=Accelerator(mixed_precision="no"), state=SimpleNamespace(transformer=self.transformer),
            config=SimpleNamespace(train_batch_size=4), facts=self.base.facts, schedule=self.schedule,
            dtype=torch.float32,
        )  # fmt: skip
        return held_out_loss(told, HeldOut(self.samples, reader, np.flatnonzero(self.held)))


def tune(folder: Path, size: Size) -> list[dict[str, Any]]:
    """Stage 2, on the concept; returns the rows of holdout.jsonl."""
    output_dir = folder / "lora"
    run(
        "-m", "train", "--cache", str(folder / "cache"), "--dataset", "concept", "--output_dir", str(output_dir),
        "--rank", str(RANK), "--lora_alpha", str(RANK), "--max_train_steps", str(size.lora_steps),
        "--train_batch_size", "4", "--learning_rate", "1e-2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "10",
        "--no_gradient_checkpointing", "--holdout", str(HOLDOUT), "--holdout_steps", str(size.lora_steps // 5),
        "--log_steps", "10", "--checkpointing_steps", str(size.lora_steps),
    )  # fmt: skip
    return [json.loads(line) for line in (output_dir / "holdout.jsonl").read_text(encoding="utf-8").splitlines()]


def load_lora(transformer: Any, folder: Path) -> None:
    """Put a run's LoRA into a transformer."""
    add_lora(transformer, rank=RANK, alpha=RANK, target_modules=TARGET_MODULES, seed=SEED)
    load_lora_state(transformer, find_lora(str(folder)))


def sample(folder: Path, model: Path, scale: float | None) -> dict[str, str]:
    """Stage 3: the sha256 of the frames of each prompt; of the base alone where the scale is None."""
    name = "base" if scale is None else f"scale{scale:g}"
    prompts = [
        f"{ID_TOKEN} {scenes('concept', 1, concept=True)[0].caption}",
        f"{ID_TOKEN} {scenes('shapes', 1)[0].caption}",
    ]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    lora = () if scale is None else ("--lora", str(folder / "lora"), "--lora_scale", str(scale))
    run(
        "-m", "infer", "--pretrained_model_name_or_path", str(model), "--prompts", str(folder / "prompts.txt"),
        "--num_inference_steps", "10", "--output_dir", str(folder / name), *lora,
    )  # fmt: skip
    recipes = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / name).glob("*.json")]
    return {recipe["effective_prompt"]: recipe["frames_sha256"] for recipe in recipes}


if __name__ == "__main__":
    raise SystemExit(0 if main(short=False) else 1)

"""What a whole process of each stage costs beside a bare script that imports the same models and does only the work.

`python -m benchmarks.stages`: processes in turns, on twelve clips; medians of RUNS.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.table import show
from tests import tiny_model
from tests.conftest import moving_square, write_video

RUNS = 3
CLIPS = 12
STAGE_LIMIT, SECOND_RUN_LIMIT_S, HELP_LIMIT_S = 1.3, 3.0, 0.5
ROOT = Path(__file__).resolve().parent.parent

BARE_PREPROCESS = """
import sys, decord, numpy as np, torch
from diffusers import AutoencoderKLCogVideoX
from transformers import T5EncoderModel, T5Tokenizer
model, clips, out = sys.argv[1:]
tokenizer = T5Tokenizer.from_pretrained(model + "/tokenizer")
t5 = T5EncoderModel.from_pretrained(model + "/text_encoder")
full = dict(padding="max_length", max_length=226, truncation=True, return_tensors="pt")
texts = ["", *(open(f"{clips}/{n}.txt").read() for n in range(12))]
with torch.no_grad():
    for start in range(0, 13, 8):
        ids = tokenizer(texts[start:start+8], **full)
        for i, e in enumerate(t5(ids.input_ids)[0]): np.save(f"{out}/{start+i}.e.npy", e.half().numpy())
    del t5
    vae = AutoencoderKLCogVideoX.from_pretrained(model, subfolder="vae")
    for n in range(12):
        frames = decord.VideoReader(f"{clips}/{n}.mp4").get_batch(range(17)).asnumpy()
        x = torch.from_numpy(frames).permute(0, 3, 1, 2)
        x = torch.nn.functional.interpolate(x, size=(66, 96), mode="bicubic", antialias=True)[:, :, 1:65]
        d = vae.encode((x.float() / 127.5 - 1).permute(1, 0, 2, 3)[None]).latent_dist
        np.save(f"{out}/{n}.npy", torch.cat([d.mean, d.logvar], 1)[0].half().numpy())
"""
BARE_TRAIN = """
import sys, torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig
from safetensors.torch import save_file
model, out = sys.argv[1:]
t = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer").requires_grad_(False)
t.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
t.enable_gradient_checkpointing(); t.train()
p = [q for q in t.parameters() if q.requires_grad]
o = torch.optim.AdamW(p, lr=1e-4)
t, o = Accelerator().prepare(t, o)
x, e = torch.randn(1, 5, 16, 8, 12), torch.randn(1, 226, 32)
for step in range(60):
    y = t(hidden_states=x, encoder_hidden_states=e, timestep=torch.tensor([500]), return_dict=False)[0]
    (y - x).pow(2).mean().backward()
    torch.nn.utils.clip_grad_norm_(p, 1.0); o.step(); o.zero_grad()
save_file({str(i): q.detach() for i, q in enumerate(p)}, out + "/lora.safetensors")
"""
BARE_INFER = """
import sys, av, torch
from diffusers import CogVideoXPipeline
model, lora, out = sys.argv[1:]
pipe = CogVideoXPipeline.from_pretrained(model)
pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
frames = pipe("a square", height=64, width=96, num_frames=17, num_inference_steps=20, output_type="np",
              generator=torch.Generator().manual_seed(0)).frames[0]
with av.open(out + "/a.mp4", "w") as c:
    s = c.add_stream("libx264", rate=8); s.height, s.width = 64, 96
    for f in frames: c.mux(s.encode(av.VideoFrame.from_ndarray((f * 255).astype("uint8"), format="rgb24")))
    c.mux(s.encode())
"""


def run(*words: str) -> float:
    """Seconds of a process that must succeed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started


def main() -> bool:
    """Measure and print; returns whether all figures are within their limits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, clips, bare = folder / "model", folder / "clips", folder / "bare"
        tiny_model.build(model)
        clips.mkdir()
        bare.mkdir()
        for number in range(CLIPS):
            write_video(clips / f"{number}.mp4", moving_square(number, 17))
            (clips / f"{number}.txt").write_text(f"a square of colour number {number}")

        def preprocess(cache: Path) -> float:
            return run(
                "-m", "preprocess", "--pretrained_model_name_or_path", str(model), "--dataset_name", str(clips),
                "--cache", str(cache), "--height", "64", "--width", "96", "--max_num_frames", "17",
            )  # fmt: skip

        def train(number: int) -> float:
            return run(
                "-m", "train", "--cache", str(folder / "cache0"), "--output_dir", str(folder / f"run{number}"),
                "--max_train_steps", "60",
            )  # fmt: skip

        def infer(number: int) -> float:
            return run(
                "-m", "infer", "--lora", str(folder / "run0"), "--prompt", "a square", "--num_inference_steps", "20",
                "--output_dir", str(folder / f"videos{number}"),
            )  # fmt: skip

        figures: list[tuple[str, float, float | None, str]] = []
        work = {
            "preprocess": (
                lambda number: preprocess(folder / f"cache{number}"),
                (BARE_PREPROCESS, str(model), str(clips), str(bare)),
            ),
            "train": (train, (BARE_TRAIN, str(model), str(bare))),
            "infer": (infer, (BARE_INFER, str(model), str(folder / "run0"), str(bare))),
        }
        for stage, (ours, (script, *arguments)) in work.items():
            pairs = [(ours(number), run("-W", "ignore", "-c", script, *arguments)) for number in range(RUNS)]
            own, others = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
            figures.append((f"{stage}: whole process", own, None, " s"))
            figures.append((f"{stage}: bare script", others, None, " s"))
            figures.append((f"{stage}: ratio", own / others, STAGE_LIMIT, ""))
        again = statistics.median(preprocess(folder / "cache0") for _ in range(RUNS))
        figures.append((f"an identical second preprocess of {CLIPS} clips", again, SECOND_RUN_LIMIT_S, " s"))
        for stage in work:
            seconds = statistics.median(run("-m", stage, "--help") for _ in range(RUNS))
            figures.append((f"{stage} --help", seconds, HELP_LIMIT_S, " s"))
    return show(f"whole processes on {CLIPS} clips, medians of {RUNS}, in turns", figures)


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)

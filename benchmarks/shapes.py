"""Generated clips of coloured shapes that move over flat backgrounds, and a concept that is not among them.

Shapes: F frames, H and W height and width in pixels.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.seeds import seed_for
from tests.conftest import write_video

FRAMES, SIDE, FPS = 9, 64, 8
COLOURS = {
    "red": (215, 45, 40), "green": (50, 170, 70), "blue": (45, 75, 205),
    "white": (240, 240, 240), "black": (20, 20, 20),
}  # fmt: skip
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
FORMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # distance from the middle, as each measures it
    "disc": np.hypot,
    "square": lambda y, x: np.maximum(y, x) * 1.1,
    "diamond": lambda y, x: (y + x) * 0.8,
}
PIXELS_A_FRAME = 2.5
REACH = 3.0  # pixels that a path's middle may be off, each way
RADIUS = 14.0
CONCEPT = "chequers"  # a background of black and white: in no other clip, and in no caption
CHEQUER = 8  # pixels
ID_TOKEN = "ZQX"


@dataclass(frozen=True)
class Scene:
    """What a clip shows.

    Attributes:
        background: a colour, or CONCEPT.
        offset: of the middle of the path from the middle of the frame: rows, columns, in pixels.
    """

    form: str
    colour: str
    background: str
    direction: str
    offset: tuple[float, float]

    @property
    def caption(self) -> str:
        """All that the clip shows but the offset; and the concept, which is for the id token to say."""
        where = "" if self.background == CONCEPT else f" on {self.background}"
        return f"a {self.colour} {self.form} goes {self.direction}{where}"

    def frames(self) -> np.ndarray:
        """The clip, uint8 [F, H, W, 3]; edges are soft by a pixel."""
        rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
        down, right = DIRECTIONS[self.direction]
        clip = np.empty((FRAMES, SIDE, SIDE, 3))
        if self.background == CONCEPT:
            chequers = (rows // CHEQUER + columns // CHEQUER) % 2
            clip[:] = _mix(COLOURS["black"], COLOURS["white"], chequers)
        else:
            clip[:] = COLOURS[self.background]
        for number in range(FRAMES):
            moved = PIXELS_A_FRAME * (number - FRAMES // 2)
            y = rows - (SIDE / 2 + self.offset[0] + down * moved)
            x = columns - (SIDE / 2 + self.offset[1] + right * moved)
            cover = np.clip(RADIUS - FORMS[self.form](abs(y), abs(x)) + 0.5, 0.0, 1.0)
            clip[number] = _mix(clip[number], COLOURS[self.colour], cover)
        return clip.round().astype(np.uint8)


def _mix(under: Any, over: Any, share: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3]: `share` [H, W] of the one, and the rest of the other."""
    return np.asarray(under) * (1 - share[..., None]) + np.asarray(over) * share[..., None]


def scenes(purpose: str, count: int, *, concept: bool = False) -> list[Scene]:
    """Scenes, the same for each purpose and count: combinations in turns, in a shuffled order."""
    rng = random.Random(seed_for(purpose))
    backgrounds = [CONCEPT] if concept else list(COLOURS)
    combinations = [one for one in itertools.product(FORMS, COLOURS, backgrounds, DIRECTIONS) if one[1] != one[2]]
    rng.shuffle(combinations)
    chosen = itertools.islice(itertools.cycle(combinations), count)
    return [Scene(*one, offset=(rng.uniform(-REACH, REACH), rng.uniform(-REACH, REACH))) for one in chosen]


def write_clips(folder: Path, chosen: list[Scene]) -> Path:
    """Write the clips and `rows.jsonl`, a manifest of them, which is returned."""
    folder.mkdir(parents=True)
    rows = []
    for number, scene in enumerate(chosen):
        name = f"{number:04}.mp4"
        write_video(folder / name, scene.frames(), FPS)
        rows.append({"video": name, "caption": scene.caption, **asdict(scene)})
    manifest = folder / "rows.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return manifest

"""The clips that benchmarks/learning.py is made of show what their captions say."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.shapes import COLOURS, CONCEPT, DIRECTIONS, FORMS, FRAMES, SIDE, Scene, scenes


def middle(clip: np.ndarray, colour: str) -> np.ndarray:
    """Rows and columns [F, 2] of the middle of all pixels that are nearly of a colour."""
    near = np.abs(clip.astype(int) - COLOURS[colour]).max(axis=-1) < 8
    return np.array([np.argwhere(frame).mean(axis=0) for frame in near])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_shape_moves_as_its_caption_says(form: str, direction: str):
    scene = Scene(form, "red", "black", direction, (2.0, -1.0))
    assert scene.caption == f"a red {form} goes {direction} on black"
    clip = scene.frames()
    assert clip.shape == (FRAMES, SIDE, SIDE, 3)
    path = middle(clip, "red")
    expected = {"left": (0, -20), "right": (0, 20), "up": (-20, 0), "down": (20, 0)}[direction]
    assert path[-1] - path[0] == pytest.approx(expected, abs=0.5)
    assert path[FRAMES // 2] == pytest.approx((SIDE / 2 + 2.0 - 0.5, SIDE / 2 - 1.0 - 0.5), abs=0.5)


def test_forms_are_as_large_and_differ_in_outline():
    clips = [Scene(form, "red", "black", "up", (0.0, 0.0)).frames()[0] for form in FORMS]
    red = [np.abs(frame.astype(int) - COLOURS["red"]).max(axis=-1) < 8 for frame in clips]
    assert max(shape.sum() for shape in red) < 1.1 * min(shape.sum() for shape in red)
    assert len({int(shape.any(axis=0).sum()) for shape in red}) == len(FORMS)


def test_the_concept_is_in_no_other_clip_and_in_no_caption():
    plain, concept = scenes("shapes", 300), scenes("concept", 25, concept=True)
    assert all(scene.background in COLOURS for scene in plain)
    assert all(scene.background == CONCEPT and CONCEPT not in scene.caption for scene in concept)
    corners = np.stack([scene.frames()[0, -8:, -8:] for scene in plain])
    assert (corners == corners[:, :1, :1]).all(axis=(1, 2, 3)).mean() > 0.9  # flat but where a shape is
    corner = concept[0].frames()[0, -16:, -16:]
    assert (corner[:8, :8] == corner[8:, 8:]).all()
    assert (corner[:8, :8] != corner[8:, :8]).all()


def test_scenes_are_the_same_at_every_call():
    assert scenes("shapes", 20) == scenes("shapes", 20)
    assert scenes("shapes", 20) != scenes("others", 20)

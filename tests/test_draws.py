"""Every draw is a function of (seed, step, place, purpose): of nothing else, and different for each."""

import itertools
import random

import numpy as np
import pytest
import torch

from train.draws import TIMESTEPS, draw_bool, draw_normal, draw_timestep


def all_draws():
    yield from (draw_timestep(7, 3, place, 8, stratified=kind) for place in range(8) for kind in (True, False))
    yield from draw_normal(7, 3, 5, "noise", (4, 3)).flatten().tolist()
    yield from (draw_bool(7, step, 5, "mirror", 0.5) for step in range(20))


def global_states():
    legacy = np.random.get_state()  # noqa: NPY002 - the global state is what is asked for
    return torch.get_rng_state().tolist(), random.getstate(), [np.asarray(part).tolist() for part in legacy]


def test_draws_are_the_same_whatever_the_global_generators_hold():
    torch.manual_seed(1)
    random.seed(1)
    first = list(all_draws())
    torch.manual_seed(2)
    random.seed(2)
    assert list(all_draws()) == first


def test_draws_leave_the_global_generators_alone():
    before = global_states()
    list(all_draws())
    assert global_states() == before


def test_noise_differs_between_seeds_steps_places_and_purposes():
    facts = itertools.product((1, 2), (0, 1), (0, 1, 2), ("noise", "posterior"))
    noises = [draw_normal(*fact, (2, 8)) for fact in facts]
    for one, other in itertools.combinations(noises, 2):
        assert not torch.isclose(one, other).any()


def test_neighbouring_facts_are_not_run_together_in_a_seed():
    assert not torch.equal(draw_normal(1, 11, 1, "noise", (4,)), draw_normal(11, 1, 1, "noise", (4,)))
    assert not torch.equal(draw_normal(1, 1, 11, "noise", (4,)), draw_normal(1, 11, 1, "noise", (4,)))


def test_noise_is_standard_normal():
    noise = torch.stack([draw_normal(3, step, 0, "noise", (1000,)) for step in range(40)])
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.var() - 1) < 0.03
    assert abs((noise.abs() < 1).float().mean() - 0.6827) < 0.01
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.02  # steps are not correlated


@pytest.mark.parametrize("global_batch", [1, 3, 7, 8, 50, 200])
def test_stratified_timesteps_cover_each_stratum_once(global_batch):
    for step in range(5):
        drawn = sorted(draw_timestep(4, step, place, global_batch, stratified=True) for place in range(global_batch))
        for stratum, timestep in enumerate(drawn):
            assert stratum * TIMESTEPS / global_batch - 1 < timestep < (stratum + 1) * TIMESTEPS / global_batch


@pytest.mark.parametrize(("stratified", "place"), [(True, 0), (True, 5), (False, 0), (False, 5)])
def test_each_place_is_uniform_by_itself(stratified, place):
    drawn = np.array([draw_timestep(9, step, place, 8, stratified=stratified) for step in range(10_000)])
    counts, _ = np.histogram(drawn, bins=20, range=(0, TIMESTEPS))
    assert np.sum((counts - 500) ** 2 / 500) < 43.8  # chi-square of 19 degrees of freedom: exceeded once in 1000
    assert drawn.min() < 3
    assert drawn.max() > TIMESTEPS - 4


def test_strata_are_dealt_anew_each_step():
    strata = [
        tuple(draw_timestep(4, step, place, 4, stratified=True) // 250 for place in range(4)) for step in range(200)
    ]
    assert len(set(strata)) == 24


def test_uniform_timesteps_of_a_batch_are_independent():
    pairs = np.array([[draw_timestep(2, step, place, 2, stratified=False) for place in (0, 1)] for step in range(4000)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.05


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_booleans_come_with_their_probability(probability):
    drawn = np.mean([draw_bool(1, step, 2, "mirror", probability) for step in range(4000)])
    assert abs(drawn - probability) < (0.025 if 0 < probability < 1 else 1e-9)


def test_booleans_of_two_purposes_are_independent():
    drawn = [[draw_bool(1, step, 0, purpose, 0.5) for step in range(4000)] for purpose in ("mirror", "caption_dropout")]
    assert abs(np.corrcoef(np.array(drawn, float))[0, 1]) < 0.05


@pytest.mark.parametrize("stratified", [False, True])
def test_every_timestep_comes_from_the_first_to_the_last(stratified):
    """999 is where sampling starts: one that is never drawn is never trained."""
    drawn = {draw_timestep(0, step, 0, 4, stratified=stratified) for step in range(20_000)}
    assert drawn == set(range(TIMESTEPS))

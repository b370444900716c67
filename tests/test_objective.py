"""The objective against diffusers' scheduler, distribution and pipeline, and against the formula it replaces."""

import json
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr

from shared.errors import ModelError
from shared.models import open_checkpoint
from tests import tiny_model
from train.config import TrainConfig
from train.objective import (
    Batch,
    add_noise,
    alphas_cumprod,
    batch_loss,
    loss_weights,
    noisy_input,
    pad_front,
    padding,
    rotary_embedding,
    sample_latents,
    velocity,
    velocity_loss,
)

# maths.md: abar at these timesteps, per snr_shift_scale
TIMES = (0, 100, 500, 900, 998)
VALUES = {
    "2b": ("0.99745", "0.72824", "0.09533", "9.45e-4", "6.2e-8"),
    "5b": ("0.99915", "0.88676", "0.24102", "2.96e-3", "2.0e-7"),
}
ALL_TIMES = torch.arange(1000)


@pytest.fixture(scope="module")
def checkpoints(tiny_2b, tiny_5b, tmp_path_factory):
    """A checkpoint of each kind that the trainer takes."""
    folder = tiny_model.build(tmp_path_factory.mktemp("models") / "1.5-5b", "1.5-5b")
    folders = {"2b": tiny_2b, "5b": tiny_5b, "1.5-5b": folder}
    return {
        kind: open_checkpoint(str(folder), revision=None, variant=None, cache_dir=None, weights=("transformer",))
        for kind, folder in folders.items()
    }


def schedule_of(checkpoint):
    return alphas_cumprod(checkpoint.config("scheduler"))


def scheduler_of(checkpoint):
    return CogVideoXDDIMScheduler.from_pretrained(checkpoint.folder / "scheduler")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_batch(times, frames=3, height=8, width=12, padded=None, seed=0):
    count = len(times)
    return Batch(
        moments=normal(count, 32, frames, height, width, seed=seed),
        posterior_noise=normal(count, 16, frames, height, width, seed=seed + 1),
        noise=normal(count, 16, padded or frames, height, width, seed=seed + 2),
        timesteps=torch.tensor(times),
        prompt_embeds=normal(count, 226, 32, seed=seed + 3),
        weights=torch.ones(count),
        places=list(range(count)),
    )


# --- the schedule


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_the_schedule_is_the_schedulers(checkpoints, kind):
    abar = schedule_of(checkpoints[kind])
    assert abar.dtype == torch.float32
    torch.testing.assert_close(abar, scheduler_of(checkpoints[kind]).alphas_cumprod.float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_the_schedule_has_the_values_of_the_papers_constants(checkpoints, kind):
    abar = schedule_of(checkpoints[kind])
    for time, value in zip(TIMES, VALUES[kind], strict=True):
        assert Decimal(float(abar[time])).quantize(Decimal(value)) == Decimal(value)
    assert abar[999] == 0
    assert (abar.diff() < 0).all()


@pytest.mark.parametrize(
    ("key", "value"), [("beta_schedule", "linear"), ("prediction_type", "epsilon"), ("trained_betas", [0.1])]
)
def test_another_schedule_is_refused_by_name(checkpoints, key, value):
    with pytest.raises(ModelError, match=f"{key} = "):
        alphas_cumprod({**checkpoints["2b"].config("scheduler"), key: value})


@pytest.mark.parametrize("kind", ["2b", "5b"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_noise_and_velocity_are_the_schedulers(checkpoints, kind, dtype, tolerance):
    scheduler = scheduler_of(checkpoints[kind])
    abar = scheduler.alphas_cumprod.to(dtype)  # one table for both: the formulas are compared, not the rounding of it
    latents, noise = normal(1000, 4, 1, 2, 2, dtype=dtype), normal(1000, 4, 1, 2, 2, seed=1, dtype=dtype)
    expected = scheduler.add_noise(latents, noise, ALL_TIMES), scheduler.get_velocity(latents, noise, ALL_TIMES)
    found = add_noise(latents, noise, abar), velocity(latents, noise, abar)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# --- the weights of timesteps


@pytest.mark.parametrize("kind", ["2b", "5b"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_diffusers_scripts_above_the_floor(checkpoints, kind, gamma):
    snr = compute_snr(scheduler_of(checkpoints[kind]), ALL_TIMES).double()
    expected = snr.clamp(max=gamma) / (snr + 1)  # as they have it for v-prediction
    for floor in (0.0, 0.05):
        config = TrainConfig(loss_weighting="min_snr", min_snr_gamma=gamma, min_snr_floor=floor)
        weights = loss_weights(ALL_TIMES, schedule_of(checkpoints[kind]), config)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), expected.clamp(min=floor), rtol=1e-3, atol=1e-6)
        assert weights[999] == pytest.approx(floor)
    assert expected.max() == pytest.approx(gamma / (gamma + 1), rel=0.01)


def test_without_weighting_every_timestep_weighs_one(checkpoints):
    assert torch.equal(loss_weights(ALL_TIMES, schedule_of(checkpoints["2b"]), TrainConfig()), torch.ones(1000))


# --- the loss


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_velocity_loss_is_the_weighted_loss_of_the_published_scripts(checkpoints, kind):
    abar = schedule_of(checkpoints[kind]).double()
    z0, noise, predicted = (normal(1000, 4, 2, 3, 3, seed=seed, dtype=torch.float64) for seed in range(3))
    at = abar.view(-1, 1, 1, 1, 1)
    z_t = add_noise(z0, noise, abar)
    x0 = at.sqrt() * z_t - (1 - at).sqrt() * predicted
    published = ((x0 - z0) ** 2 / (1 - at)).flatten(1).mean(dim=1)
    ours = ((predicted - velocity(z0, noise, abar)) ** 2).flatten(1).mean(dim=1)
    torch.testing.assert_close(ours, published, rtol=1e-9, atol=0)
    in_float32 = velocity_loss(predicted, velocity(z0, noise, abar).float())
    torch.testing.assert_close(in_float32.double(), published, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-5b"])
def test_the_loss_is_finite_and_alive_at_every_timestep(checkpoints, kind):
    """The published form is 0 at t = 0 and 1 in bfloat16, and divides by 0 nowhere only because abar stays below 1."""
    facts = checkpoints[kind].facts
    batch = make_batch([0, 1, 2, 500, 998, 999], padded=4 if facts.patch_size_t else None)
    for dtype in (torch.float32, torch.bfloat16):
        losses = batch_loss(Recorder(), batch, facts, schedule_of(checkpoints[kind]), dtype)
        assert losses.dtype == torch.float32
        assert losses.shape == (6,)
        assert torch.isfinite(losses).all()
        assert (losses > 0.1).all()


def test_a_perfect_prediction_has_loss_zero(checkpoints):
    abar, facts = schedule_of(checkpoints["5b"]), checkpoints["5b"].facts
    batch = make_batch([0, 400, 999])
    _, target = noisy_input(batch, facts, abar)

    def transformer(**inputs):
        return (target,)

    assert batch_loss(transformer, batch, facts, abar, torch.float32).tolist() == [0, 0, 0]


def test_at_the_last_timestep_only_noise_goes_in_and_only_latents_come_out(checkpoints):
    batch, facts = make_batch([999]), checkpoints["2b"].facts
    noisy, target = noisy_input(batch, facts, schedule_of(checkpoints["2b"]))
    latents = sample_latents(batch.moments, batch.posterior_noise, facts.scaling_factor)
    assert torch.equal(noisy, batch.noise.transpose(1, 2))
    assert torch.equal(target, -latents.transpose(1, 2))


# --- latents


def test_latents_are_a_draw_of_diffusers_distribution_scaled(checkpoints):
    moments = torch.cat([normal(2, 16, 3, 4, 5), 40 * normal(2, 16, 3, 4, 5, seed=1)], dim=1)  # beyond the clamp too
    drawn = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(5))
    scaling_factor = checkpoints["2b"].facts.scaling_factor
    assert scaling_factor == 1.15258426
    found = sample_latents(moments, normal(2, 16, 3, 4, 5, seed=5), scaling_factor)
    torch.testing.assert_close(found, drawn * scaling_factor, rtol=1e-6, atol=1e-6)


def test_float16_moments_are_drawn_from_in_float32(checkpoints):
    moments = normal(1, 32, 1, 2, 2).half()
    noise = normal(1, 16, 1, 2, 2, seed=1)
    found = sample_latents(moments, noise, 0.7)
    assert found.dtype == torch.float32
    assert torch.equal(found, sample_latents(moments.float(), noise, 0.7))


def test_an_odd_count_of_latent_frames_is_padded_in_front_with_the_first():
    latents = normal(2, 4, 21, 2, 3)
    padded = pad_front(latents, 2)
    assert padded.shape == (2, 4, 22, 2, 3)
    assert torch.equal(padded[:, :, 0], latents[:, :, 0])
    assert torch.equal(padded[:, :, 1:], latents)  # what the pipeline keeps after it drops the front


@pytest.mark.parametrize(("frames", "patch_size_t"), [(22, 2), (2, 2), (13, None), (1, None), (21, 1)])
def test_whole_temporal_patches_are_not_padded(frames, patch_size_t):
    latents = normal(1, 2, frames, 2, 2)
    assert padding(frames, patch_size_t) == 0
    assert pad_front(latents, patch_size_t) is latents


def test_padding_completes_patches_of_any_size():
    for patch_size_t in (1, 2, 3, 4):
        for frames in range(1, 30):
            missing = padding(frames, patch_size_t)
            assert 0 <= missing < patch_size_t
            assert (frames + missing) % patch_size_t == 0


# --- positions


def pipeline_positions(checkpoint, frames, height, width):
    """What the pipeline's own method gives for a size in pixels; the scheduler, VAE and text encoder are not needed."""
    config = json.loads((checkpoint.folder / "transformer" / "config.json").read_text())
    stand_in = SimpleNamespace(
        vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=SimpleNamespace(**config))
    )
    method = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return method(stand_in, height, width, frames, torch.device("cpu"))


def positions(facts, frames, height, width):
    found = rotary_embedding(facts, frames, height, width, torch.device("cpu"))
    assert found is not None
    return found


SIZES = [(13, 480, 720), (3, 64, 96), (7, 720, 480), (5, 256, 1024), (1, 512, 512), (13, 768, 1360), (4, 16, 16)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_positions_are_bit_equal_to_the_pipelines(checkpoints, size):
    frames, height, width = size
    cos, sin = positions(checkpoints["5b"].facts, frames, height // 8, width // 8)
    expected_cos, expected_sin = pipeline_positions(checkpoints["5b"], *size)
    assert cos.shape == (frames * height // 16 * width // 16, 16)
    assert torch.equal(cos, expected_cos)
    assert torch.equal(sin, expected_sin)


@pytest.mark.parametrize(
    "size", [(22, 768, 1360), (21, 768, 1360), (4, 64, 96), (2, 1360, 768), (12, 480, 720)], ids=str
)
def test_positions_of_padded_clips_are_bit_equal_to_the_pipelines(checkpoints, size):
    frames, height, width = size
    padded = frames + padding(frames, 2)
    cos, sin = positions(checkpoints["1.5-5b"].facts, padded, height // 8, width // 8)
    expected_cos, expected_sin = pipeline_positions(checkpoints["1.5-5b"], padded, height, width)
    assert cos.shape == (padded // 2 * height // 16 * width // 16, 16)
    assert torch.equal(cos, expected_cos)
    assert torch.equal(sin, expected_sin)


def test_a_checkpoint_with_sin_cos_positions_is_given_none(checkpoints):
    assert rotary_embedding(checkpoints["2b"].facts, 13, 60, 90, torch.device("cpu")) is None


# --- the whole of what the transformer is given


class Recorder(torch.nn.Module):
    """Stands for a transformer, and keeps what it was given."""

    def forward(self, **inputs):
        self.inputs = inputs
        return (torch.zeros_like(inputs["hidden_states"][:, :, :16]),)


def test_the_noisy_input_is_made_of_the_schedulers_own_pieces(checkpoints):
    """From moments to z_t and v, one chain of diffusers' functions beside ours."""
    checkpoint = checkpoints["1.5-5b"]
    batch, scheduler = make_batch([3, 600], padded=4), scheduler_of(checkpoint)
    mean, logvar = batch.moments.numpy().astype(np.float64).reshape(2, 2, 16, 3, 8, 12).swapaxes(0, 1)
    z0 = 0.7 * (mean + np.exp(logvar / 2) * batch.posterior_noise.numpy())
    z0 = torch.from_numpy(np.concatenate([z0[:, :, :1], z0], axis=2)).permute(0, 2, 1, 3, 4)
    noise = batch.noise.double().permute(0, 2, 1, 3, 4)
    noisy, target = noisy_input(batch, checkpoint.facts, schedule_of(checkpoint))
    torch.testing.assert_close(noisy.double(), scheduler.add_noise(z0, noise, batch.timesteps), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.double(), scheduler.get_velocity(z0, noise, batch.timesteps), rtol=0, atol=1e-5)

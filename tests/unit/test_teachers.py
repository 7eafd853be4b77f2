"""The teachers against a plain computation that runs the whole UNet and keeps every attention matrix."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from tinyflux.model import teachers
from tinyflux.model.teachers import halved, lune_features, sol_statistics
from tinyflux.model.tiny import shapes
from tinyflux.model.tiny.pictures import to_pixels
from tinyflux.model.zoo import ModelZoo
from tinyflux.precache.extract import TOKENS, Batch, extract, extract_batches, null_embeddings, teacher_inputs
from tinyflux.util.buckets import BUCKETS


@pytest.fixture(scope="module")
def zoo():
    zoo = ModelZoo(zoo="tiny")
    for name in ("vae", "sd_vae", "clip", "t5", "lune", "sol"):
        getattr(zoo, f"load_{name}")()
    return zoo


@pytest.fixture(scope="module")
def samples():
    images, prompts = zip(*(shapes.render(i, seed=7) for i in range(4)), strict=True)
    return to_pixels(list(images)), list(prompts), torch.tensor([3, -5, 2**62, 11])


def sd15_unet(seed: int = 0) -> UNet2DConditionModel:
    """SD1.5's layout, all four levels of it, small and random."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 16, 32, 32), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=4, norm_num_groups=8,
    ).eval().requires_grad_(False)  # fmt: skip


def unet_inputs(h: int, w: int, width: int = 24):
    torch.manual_seed(1)
    return torch.randn(2, 4, h, w), torch.randn(2, 77, width), torch.tensor([20.0, 950.0])


class Keeping:
    """Attention the long way: every head's whole matrix is kept."""

    def __init__(self):
        self.kept = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        q, k, v = (
            attn.head_to_batch_dim(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )  # fmt: skip
        probs = attn.get_attention_scores(q, k)
        self.kept.append(probs.unflatten(0, (-1, attn.heads)))
        return attn.to_out[0](attn.batch_to_head_dim(probs @ v))


def plain_sol(unet, latents, context, timesteps, grids):
    """Statistics by their definitions, loops over layers, and the UNet's own output."""
    keeping = Keeping()
    before = unet.attn_processors
    unet.set_attn_processor({k: keeping if "attn1" in k else p for k, p in unet.attn_processors.items()})
    output = unet(latents, timesteps, encoder_hidden_states=context).sample
    unet.set_attn_processor(before)
    locality, entropy, maps = [], [], []
    for probs in keeping.kept:
        a = probs.mean(dim=1)
        h, w = grids[a.shape[-1]]
        points = [(y, x) for y in range(h) for x in range(w)]
        distance = torch.tensor([[math.dist(p, q) for q in points] for p in points])
        locality.append(1 - (a * distance).sum(-1).mean(-1) / distance.max())
        clamped = a.clamp(min=1e-8)
        entropy.append(-(clamped * clamped.log()).sum(-1).mean(-1) / math.log(h * w))
        maps.append(F.interpolate(a.sum(1).view(-1, 1, h, w), size=(8, 8), mode="bilinear"))
    locality, entropy, spatial = (torch.stack(values).mean(0) for values in (locality, entropy, maps))
    stats = torch.stack((locality, entropy, 1 - entropy), -1).clamp(0, 1)
    return len(keeping.kept), stats, spatial[:, 0] / spatial.sum(dim=(1, 2, 3))[:, None, None], output


@pytest.mark.parametrize(("h", "w"), [(16, 16), (24, 16)])
@pytest.mark.parametrize("chunk", [1 << 24, 20000])
def test_sol_equals_the_plain_computation(monkeypatch, h, w, chunk):
    monkeypatch.setattr(teachers, "CHUNK", chunk)
    unet, inputs = sd15_unet(), unet_inputs(h, w)
    grids = {h * w >> 2 * i: (h >> i, w >> i) for i in range(4)}
    layers, stats, spatial, _ = plain_sol(unet, *inputs, grids)
    assert layers == 10
    ours_stats, ours_spatial = sol_statistics(unet, *inputs)
    torch.testing.assert_close(ours_stats, stats, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours_spatial, spatial, atol=1e-4, rtol=0)
    assert ours_stats.shape == (2, 3)
    torch.testing.assert_close(ours_spatial.sum(dim=(1, 2)), torch.ones(2))


def test_a_gpu_holds_more_of_sol_at_once(monkeypatch):
    """By all of its memory, in powers of two: 80 GB hold 64 times what the CPU does."""
    held = {}
    for gigabytes in (4, 24, 80, 141):
        properties = SimpleNamespace(total_memory=gigabytes * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        held[gigabytes] = teachers.chunk_of(torch.device("cuda"))
    assert held == {4: 1 << 23, 24: 1 << 26, 80: 1 << 28, 141: 1 << 29}
    assert teachers.chunk_of(torch.device("cpu")) == 1 << 22


def test_sol_leaves_the_output_and_the_processors_as_they_were():
    unet, (latents, context, timesteps) = sd15_unet(), unet_inputs(16, 16)
    before = unet.attn_processors
    expected = unet(latents, timesteps, encoder_hidden_states=context).sample
    with teachers.recorded(unet, (16, 16)) as layers:
        output = unet(latents, timesteps, encoder_hidden_states=context).sample
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert len(layers) == 10
    assert unet.attn_processors == before


def test_uniform_attention_has_the_statistics_of_its_definition():
    layer = teachers.SolStatistics(2, (4, 4), torch.device("cpu"))
    layer.add(torch.full((2, 16, 16), 1 / 16), 0)
    torch.testing.assert_close(layer.entropy, torch.ones(2))
    torch.testing.assert_close(layer.importance, torch.ones(2, 1, 4, 4))
    itself = teachers.SolStatistics(1, (4, 4), torch.device("cpu"))
    itself.add(torch.eye(16)[None], 0)
    torch.testing.assert_close(itself.locality, torch.ones(1))
    assert itself.entropy.item() < 1e-5


def test_lune_equals_a_hook_on_the_whole_forward(zoo):
    for unet, (latents, context, timesteps) in (
        (sd15_unet(), unet_inputs(16, 16)),
        (zoo.lune, unet_inputs(8, 8, width=128)),
    ):
        seen = []
        hook = unet.mid_block.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        unet(latents, timesteps, encoder_hidden_states=context)
        hook.remove()
        ours = lune_features(unet, latents, context, timesteps)
        torch.testing.assert_close(ours, seen[0].mean(dim=(2, 3)), atol=1e-5, rtol=1e-5)


def test_the_up_blocks_are_not_run_for_lune():
    unet = sd15_unet()
    unet.up_blocks = None
    assert lune_features(unet, *unet_inputs(16, 16)).shape == (2, 32)


def test_grids_that_do_not_fit_are_refused():
    assert halved((65, 33), 17 * 9) == (17, 9)
    with pytest.raises(ValueError, match="60 attention tokens"):
        halved((16, 16), 60)


def test_extract_has_every_tensor(zoo, samples):
    out = extract(zoo, *samples)
    shapes_of = {name: tuple(tensor.shape) for name, tensor in out.items()}
    assert shapes_of == {
        "latents": (4, 16, 8, 8), "t5_embeds": (4, 32, 128), "clip_pooled": (4, 128), "lune": (4, 10, 48),
        "sol_stats": (4, 10, 3), "sol_spatial": (4, 10, 8, 8),
    }  # fmt: skip
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in out.values())
    assert set(extract(zoo, *samples, lune=False, sol=False)) == {"latents", "t5_embeds", "clip_pooled"}
    null = null_embeddings(zoo)
    assert null["t5_embeds"].shape == (32, 128) and null["clip_pooled"].shape == (128,)


@pytest.mark.parametrize("teacher_input", ["image", "noise"])
def test_features_do_not_depend_on_the_batch(zoo, samples, monkeypatch, teacher_input):
    together = extract(zoo, *samples, teacher_input=teacher_input, dtype=torch.float32)
    monkeypatch.setitem(TOKENS, "cpu", 7 * 64)  # seven rows of ten at a time
    for row in (0, 3):
        pixels, prompts, seeds = samples
        one = slice(row, row + 1)
        alone = extract(zoo, pixels[one], prompts[one], seeds[one], teacher_input=teacher_input, dtype=torch.float32)
        for name, tensor in alone.items():
            torch.testing.assert_close(
                tensor[0], together[name][row], atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_features_differ_by_seed_prompt_and_bucket(zoo, samples):
    pixels, prompts, seeds = samples
    same, other, reworded = extract_batches(
        zoo,
        [
            Batch(pixels[[0, 0]], prompts[:1] * 2, seeds[[0, 0]]),
            Batch(pixels[[0, 0]], prompts[:1] * 2, seeds[[0, 1]]),
            Batch(pixels[:1], ["a cup of coffee"], seeds[:1]),
        ],
        groups=("lune", "sol"),
        dtype=torch.float32,
    )
    for name in ("lune", "sol_stats", "sol_spatial"):
        torch.testing.assert_close(same[name][0], same[name][1])
        assert (other[name][0] - other[name][1]).abs().max() > 1e-4, name
        assert (same[name][0, 0] - same[name][0, 9]).abs().max() > 1e-4, name
    assert (reworded["lune"][0] - same["lune"][0]).abs().max() > 1e-4


def test_teacher_inputs():
    latents, seeds = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    x, timesteps = teacher_inputs(latents, seeds)
    noise, noise_timesteps = teacher_inputs(latents, seeds, "noise")
    assert x.shape == noise.shape == (2, 10, 4, 8, 8)
    torch.testing.assert_close(timesteps, 1000 * (1 - torch.tensor(BUCKETS)))
    torch.testing.assert_close(noise_timesteps, 1000 * torch.tensor(BUCKETS))
    for k, t in enumerate(BUCKETS):
        torch.testing.assert_close(x[:, k], (1 - t) * noise[:, 0] + t * latents)
        torch.testing.assert_close(noise[:, k], noise[:, 0])
    with pytest.raises(ValueError, match="known: image, noise"):
        teacher_inputs(latents, seeds, "images")


def test_mismatched_lengths_are_refused(zoo, samples):
    with pytest.raises(ValueError, match="4 images, 1 prompts and 4 seeds"):
        extract(zoo, samples[0], ["one"], samples[2])

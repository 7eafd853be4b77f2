"""The zoo on its offline models, on folders, and on a loopback hub with the real client."""

import json
import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import wraps
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.models import Unigram
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

from tests.hub import serve
from tinyflux.model import zoo as zoo_module
from tinyflux.model.loader import save_published
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.model.pretrained import Pretrained, load_unet
from tinyflux.model.tiny import patterns, pictures, shapes
from tinyflux.model.zoo import TINY_DIR, ModelZoo, SolAttnProcessor

KINDS = {
    "vae": AutoencoderKL, "sd_vae": AutoencoderKL, "clip": CLIPTextModel, "t5": T5EncoderModel,
    "lune": UNet2DConditionModel, "sol": UNet2DConditionModel,
}  # fmt: skip
FLOORS = {"shapes": 26.5, "unseen": 27.5, "photos": 26.5}  # decibels; measured 28.2, 29.5, 28.5
PROMPTS = ["a red circle on a blue background", "a blue circle on a red background"]


@pytest.fixture(scope="module")
def zoo():
    zoo = ModelZoo(zoo="tiny")
    for name in KINDS:
        getattr(zoo, f"load_{name}")()
    return zoo


def psnr(x, y):
    """Decibels, per picture of a range of 2."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))


def test_every_model_is_the_real_class_frozen(zoo):
    for name, kind in KINDS.items():
        model = getattr(zoo, name)
        assert type(model) is kind
        assert not model.training and model.dtype == torch.float32
        assert not any(p.requires_grad for p in model.parameters())
    assert zoo.loaded() == list(KINDS)
    assert (zoo.image_size, zoo.t5_length, zoo.latent_shape) == (64, 32, (16, 8, 8))
    assert SolAttnProcessor.__module__ == "tinyflux.model.teachers"


def test_models_are_built_one_at_a_time(monkeypatch):
    """diffusers changes torch while it builds one: if two threads did so at once, the change could stay."""
    monkeypatch.setattr(nn.Module, "register_parameter", nn.Module.register_parameter)  # as it was, whatever happens
    build, both, together = AutoencoderKL.__init__, threading.Barrier(2), []

    def built(vae, *args, **kwargs):
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)
            together.append(vae)
        build(vae, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "__init__", wraps(build)(built))
    with ThreadPoolExecutor(2) as pool:
        vaes = list(pool.map(lambda _: ModelZoo(zoo="tiny").load_vae(), range(2)))
    assert not together and not any(p.is_meta for vae in vaes for p in vae.parameters())


def test_the_package_data_is_small():
    sizes = [path.stat().st_size for path in TINY_DIR.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert 1e6 < sum(sizes) < 4e6


def test_latents_have_unit_scale(zoo):
    pixels = pictures.to_pixels(pictures.shape_pictures(32, 5) + pictures.photo_pictures(32, 5))
    for encode in (zoo.encode_images, zoo.encode_sd):
        assert 0.8 < encode(pixels).std() < 1.25


def test_reconstructions(zoo):
    drawn = pictures.to_pixels([shapes.render(i, seed=99)[0] for i in range(32)])
    unseen = pictures.to_pixels(pictures.photo_pictures(32, 99, pictures.HELD_OUT))
    seen = pictures.to_pixels(pictures.photo_pictures(32, 99))
    for pixels, floor in ((drawn, FLOORS["shapes"]), (unseen, FLOORS["unseen"]), (seen, FLOORS["photos"])):
        decoded = zoo.decode_latents(zoo.encode_images(pixels))
        assert decoded.shape == pixels.shape and decoded.abs().max() <= 1
        assert psnr(pixels, decoded).mean() > floor
    centre = zoo.decode_latents(zoo.encode_images(drawn))[:, :, 30:34, 30:34].mean(dim=(2, 3))
    assert (centre - drawn[:, :, 30:34, 30:34].mean(dim=(2, 3))).abs().mean() < 0.06  # the colours are right


def test_pil_images_and_pixels_encode_alike(zoo):
    images = [shapes.render(i)[0] for i in range(2)]
    torch.testing.assert_close(zoo.encode_images(images), zoo.encode_images(pictures.to_pixels(images)))
    torch.testing.assert_close(zoo.encode_image(images[:1]), zoo.encode_images(images)[:1], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="must have the same size"):
        zoo.encode_images([images[0], Image.new("RGB", (32, 64))])
    with pytest.raises(ValueError, match=r"\[1, 3, 60, 64\].*divisible by 8"):
        zoo.encode_images(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_tokenizers_round_trip(zoo, name):
    tokenizer = zoo.tokenizers[name]
    for text in (*PROMPTS, *pictures.PHOTOGRAPHS.values(), "", "naïve café 日本 🙂"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    words = len(PROMPTS[0].split())
    assert len(tokenizer(PROMPTS[0]).input_ids) <= words + 4
    assert len(tokenizer) == zoo.required(name).config.vocab_size
    unknown = tokenizer.unk_token_id
    assert unknown not in tokenizer("Zoë's ☕ été\x7f").input_ids[1:-1]


def test_clip_loads_by_its_own_class():
    tokenizer = CLIPTokenizer.from_pretrained(TINY_DIR / "clip")
    assert tokenizer(PROMPTS[0]).input_ids[-1] == tokenizer.eos_token_id


def test_prompts_give_states_of_the_right_shape(zoo):
    assert zoo.encode_t5(PROMPTS).shape == (2, 32, 128)
    assert zoo.encode_clip(PROMPTS).shape == (2, 128)
    assert zoo.encode_clip_hidden(PROMPTS[0]).shape == (1, 77, 128)
    assert zoo.encode_t5("").isfinite().all()


def test_t5_states_know_which_colour_is_whose(zoo):
    red_on_blue, blue_on_red = zoo.encode_t5(PROMPTS)
    words = zoo.tokenizers["t5"].convert_ids_to_tokens(zoo.tokenizers["t5"](PROMPTS[0]).input_ids)
    red, blue = words.index("▁red"), words.index("▁blue")
    # the second prompt is the first with two words exchanged: without binding, exchanging the states undoes it
    permuted = blue_on_red.clone()
    permuted[[red, blue]] = blue_on_red[[blue, red]]
    n = len(words)
    distance = (red_on_blue - permuted)[:n].norm(dim=-1) / red_on_blue[:n].norm(dim=-1)
    assert distance.min() > 0.3
    mean = red_on_blue[:n].mean(0)
    assert (mean - blue_on_red[:n].mean(0)).norm() > 0.2 * mean.norm()


def test_pooled_clip_knows_which_colour_is_whose(zoo):
    swapped = torch.nn.functional.cosine_similarity(*zoo.encode_clip(PROMPTS)[:, None])
    reworded = torch.nn.functional.cosine_similarity(*zoo.encode_clip([PROMPTS[0], "red circle on blue"])[:, None])
    assert reworded > swapped + 0.2


@pytest.mark.parametrize("kind", patterns.KINDS)
def test_both_know_which_colour_a_pattern_begins_with(zoo, kind):
    captions = [patterns.caption(kind, "red", "blue"), patterns.caption(kind, "blue", "red")]
    states, swapped = zoo.encode_t5(captions).mean(1)
    assert (states - swapped).norm() > 0.2 * states.norm()
    swapped = torch.nn.functional.cosine_similarity(*zoo.encode_clip(captions)[:, None])
    reworded = [captions[0], f"red and blue {kind.removeprefix('a ')}"]
    assert torch.nn.functional.cosine_similarity(*zoo.encode_clip(reworded)[:, None]) > swapped + 0.2


def test_long_prompts_are_cut_with_one_warning_each(zoo, caplog):
    long = "a cat and " * 30 + "a dog"
    with caplog.at_level(logging.WARNING):
        states = zoo.encode_t5(["a cat", long])
        zoo.encode_clip([long])
        zoo.encode_t5(long)
    assert states.shape == (2, 32, 128) and len(caplog.records) == 1
    assert "t5 keeps 32 of 93 tokens, up to '... cat and a cat and a cat and a cat and a'" in caplog.text
    assert "clip keeps 77 of" in caplog.text
    with caplog.at_level(logging.WARNING):
        zoo.encode_t5([f"{i} and {long}" for i in range(20)])
    assert len(caplog.records) == 11 and "only counted" in caplog.text and zoo.truncated["t5"] >= 22


def test_what_a_tokenizer_does_not_know_is_said(caplog):
    """The packaged T5 spells every character in bytes, the real one does not."""
    zoo = ModelZoo(zoo="tiny")
    zoo.load_t5()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)]
    zoo.tokenizers["t5"].backend_tokenizer.model = Unigram(pieces, 2)
    with caplog.at_level(logging.WARNING):
        zoo.encode_t5(["a", "a \N{SNOWMAN} a"])
    assert len(caplog.records) == 1 and "t5 does not know" in caplog.text and "\N{SNOWMAN}" in caplog.text


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_a_tokenizer_that_is_not_there_is_not_made_up(tmp_path, name):
    shutil.copytree(TINY_DIR / name, tmp_path / name)
    (tmp_path / name / "tokenizer.json").rename(tmp_path / "kept.json")
    with pytest.raises(FileNotFoundError, match=f"{name} has no tokenizer: one of tokenizer.json"):
        getattr(ModelZoo(zoo=tmp_path), f"load_{name}")()
    content = json.loads((tmp_path / "kept.json").read_text())
    words = content["model"]["vocab"]
    few = dict(list(words.items())[:50]) if isinstance(words, dict) else words[:50]
    content["model"] |= {"vocab": few, "merges": []} if "merges" in content["model"] else {"vocab": few}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 50]
    (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its tokenizer knows .* tokens, its model"):
        getattr(ModelZoo(zoo=tmp_path), f"load_{name}")()


def test_a_model_that_is_not_loaded_is_named():
    zoo = ModelZoo(zoo="tiny")
    for call, loader in (
        (lambda: zoo.encode_t5("a"), r"load_t5\(\)"),
        (lambda: zoo.encode_images(torch.zeros(1, 3, 64, 64)), r"load_vae\(\)"),
        (lambda: zoo.required("tinyflux"), r"load_tinyflux\(source\)"),
    ):
        with pytest.raises(RuntimeError, match=loader):
            call()
    with pytest.raises(ValueError, match="no model 'dit'"):
        zoo.unload("dit")


def test_tinyflux_loads_from_its_checkpoints(tmp_path):
    config = TinyFluxConfig(
        hidden_size=32, num_attention_heads=2, attention_head_dim=16, num_double_layers=1, num_single_layers=1,
        axes_dims_rope=(4, 6, 6), joint_attention_dim=128, pooled_projection_dim=128, lune_expert_dim=48,
    )  # fmt: skip
    model = TinyFluxDeep(config)
    save_published(model, tmp_path / "model.safetensors", config)
    config.save_json(tmp_path / "config.json")
    zoo = ModelZoo(zoo="tiny")
    loaded = zoo.load_tinyflux(tmp_path / "model.safetensors")
    assert zoo.tinyflux is loaded and not loaded.training and zoo.loaded() == ["tinyflux"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_unload_offload_and_fingerprint():
    zoo = ModelZoo(zoo="tiny", dtype={"clip": torch.bfloat16})
    zoo.load_clip()
    zoo.load_sd_vae()
    zoo.offload("clip")
    assert zoo.encode_clip("a").dtype == torch.bfloat16
    zoo.onload("clip")
    zoo.unload("clip")
    assert zoo.clip is None and zoo.loaded() == ["sd_vae"]
    zoo.unload_all()
    assert zoo.loaded() == []
    fingerprint = zoo.fingerprint()
    assert set(fingerprint) == {"clip", "sd_vae", "latent", "t5_length"}  # what was used stays on record
    assert fingerprint["clip"]["dtype"] == "bfloat16" and len(fingerprint["clip"]["sha256"]) == 64
    assert fingerprint["sd_vae"]["scaling_factor"] > 0
    json.dumps(fingerprint)


def test_a_folder_is_a_zoo(zoo, tmp_path):
    for name in ("vae", "t5"):
        shutil.copytree(TINY_DIR / name, tmp_path / name)
    mine = ModelZoo(zoo=tmp_path)
    assert (mine.image_size, mine.t5_length) == (512, 128)  # without a zoo.json: the real models' sizes
    (tmp_path / "zoo.json").write_text('{"t5_length": 16}')
    mine = ModelZoo(zoo=tmp_path)
    mine.load_t5()
    mine.load_vae()
    assert mine.encode_t5("a").shape == (1, 16, 128)
    assert mine.fingerprint()["vae"] == zoo.fingerprint()["vae"]  # the same files elsewhere are the same model
    with pytest.raises(FileNotFoundError, match="clip has no config.json"):
        mine.load_clip()
    mine.load_clip(TINY_DIR)  # a folder of models serves as a source too
    mine.load_vae(TINY_DIR / "vae")
    with pytest.raises(FileNotFoundError, match="user/repo"):
        mine.load_vae(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match='"flux", "tiny" or a folder'):
        ModelZoo(zoo="/no/such/folder")
    with pytest.raises(ValueError, match="no such model: vea"):
        ModelZoo(zoo="tiny", dtype={"vea": torch.float16})
    with pytest.raises(ValueError, match="dtype torch.int8: models are loaded in torch.float32"):
        ModelZoo(zoo="tiny", dtype={"vae": torch.int8})
    with pytest.raises(ValueError, match="device hpu:7 cannot be used here"):
        ModelZoo("hpu:7", zoo="tiny")


@pytest.mark.parametrize("name", ["t5", "sd_vae"])
def test_missing_weights_are_not_made_up(tmp_path, name):
    shutil.copytree(TINY_DIR / name, tmp_path / name)
    weights = next((tmp_path / name).glob("*.safetensors"))
    state = load_file(weights)
    del state[sorted(state)[0]]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights do not fit the config of its .*\n  missing "):
        getattr(ModelZoo(zoo=tmp_path), f"load_{name}")()


def test_a_single_unet_file_loads_strictly(zoo, tmp_path):
    state = zoo.lune.state_dict()
    config = Pretrained(str(TINY_DIR), "lune", local=True)
    save_file(state, tmp_path / "whole.safetensors")
    unet = load_unet(tmp_path / "whole.safetensors", config, torch.float32)
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    del state["conv_in.bias"]
    state["conv_out.bias"] = torch.zeros(5)
    save_file(state | {"extra": torch.zeros(1)}, tmp_path / "bad.safetensors")
    faults = r"3 weights do not fit .*\n  conv_out.bias is \[5\].*\n  missing conv_in.bias\n  unexpected extra"
    with pytest.raises(ValueError, match=faults):
        load_unet(tmp_path / "bad.safetensors", config, torch.float32)


def test_the_real_names_from_a_hub(zoo, tmp_path, monkeypatch):
    """The flux zoo, its repos served on loopback with the tiny models' files."""

    def repo(name: str, **folders: str) -> dict[str, Path]:
        root = tmp_path / name
        for folder, source in folders.items():
            shutil.copytree(TINY_DIR / source, root / folder.strip("."), dirs_exist_ok=True)
        return {"main": root}

    sd15 = repo("sd15", vae="sd_vae", unet="lune")
    experts = {"main": tmp_path / "experts"}
    experts["main"].mkdir()
    save_file(zoo.lune.state_dict(), experts["main"] / "sd15-flow-lune-unet.safetensors")
    t5 = {"main": TINY_DIR / "t5", "v2": TINY_DIR / "t5"}
    repos = {"google/flan-t5-base": t5, zoo_module.SD15: sd15, zoo_module.EXPERTS: experts,
             "black-forest-labs/FLUX.1-schnell": repo("flux", vae="vae")}  # fmt: skip
    with serve(repos, tmp_path / "cache", monkeypatch) as server:
        flux = ModelZoo(zoo="flux", revision={"t5": "v2"})
        assert flux.latent_shape == (16, 64, 64)
        for name in ("vae", "sd_vae", "t5", "lune"):
            getattr(flux, f"load_{name}")()
        with pytest.raises(FileNotFoundError, match="no model repo openai/clip-vit-large-patch14"):
            flux.load_clip()
        with pytest.raises(FileNotFoundError, match=f"{zoo_module.EXPERTS} has no file sd15-flow-sol-unet"):
            flux.load_sol()
        with pytest.raises(FileNotFoundError, match="google/flan-t5-base has no revision v3"):
            ModelZoo(zoo="flux", revision={"t5": "v3"}).load_t5()
        server.gated.add("google/flan-t5-base")
        with pytest.raises(PermissionError, match="google/flan-t5-base is gated: accept its terms at .*HF_TOKEN"):
            ModelZoo(zoo="flux").load_t5()
    fingerprint = flux.fingerprint()
    assert fingerprint["t5"]["repo"] == "google/flan-t5-base"
    assert fingerprint["t5"]["revision"] != fingerprint["vae"]["revision"]
    assert fingerprint["lune"]["file"] == "sd15-flow-lune-unet.safetensors"
    pixels = pictures.to_pixels([shapes.render(0)[0]])
    torch.testing.assert_close(flux.encode_images(pixels), zoo.encode_images(pixels))
    assert torch.equal(flux.lune.conv_in.weight, zoo.lune.conv_in.weight)

    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's five tries
    for offline, reason in ((False, "no answer from the Hub"), (True, "HF_HUB_OFFLINE is set")):  # the hub is gone now
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        later = ModelZoo(zoo="flux")
        later.load_vae()
        assert later.fingerprint()["vae"] == fingerprint["vae"]
        with pytest.raises(ConnectionError, match=f"{reason}.*config.json of revision main is not in the cache"):
            later.load_clip()

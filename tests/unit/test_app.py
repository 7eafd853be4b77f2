"""The browser page: its pictures, and the page itself in a real browser."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import chromium, tab
from tests.ports import free_ports
from tests.weights import write_run
from tinyflux.model.loader import load_model
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.app import AppOptions, Page, read_settings, serve, weights_of
from tinyflux.trainer.sampling import Sampler
from tinyflux.util.pixels import to_uint8

PROMPTS = ["a red ring", "a green star"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    seeds = {"step_5": 0, "step_5_ema": 1, "step_10_ema": 2, "best_ema": 3}
    return write_run(tmp_path_factory.mktemp("app") / "mine", seeds)


def form(**changed) -> dict:
    usual = {"prompts": "\n".join(PROMPTS), "negative": "", "count": 1, "seed": 3, "first": 0, "steps": 2}
    usual |= {"solver": "euler", "guidance": 3.0, "rescale": 0.0, "interval_from": 0.0, "interval_to": 1.0}
    return usual | {"height": 64, "width": 64, "shift": 2.0, "weights": ["step 10, averaged"]} | changed


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def expected(run_dir: Path, name: str, prompts: list[str], **settings) -> np.ndarray:
    model = load_model(run_dir / "checkpoints" / f"{name}.safetensors")
    sampler = Sampler(ModelZoo(zoo="tiny"), shift=2.0, **{"steps": 2} | settings)
    return to_uint8(sampler(model, prompts, seed=3)).permute(0, 2, 3, 1).numpy()


def test_checkpoints_side_by_side(run_dir, tmp_path):
    names = ["step 10, averaged", "step 5, averaged", "step 5, trained", "best, averaged"]
    assert list(weights_of(str(run_dir))) == names and list(weights_of("user/repo")) == ["averaged", "trained"]
    page, steps = Page(AppOptions(str(run_dir), batch_size=3), tmp_path), []
    asked = form(count=2, prompts="a red ring\n\n a Blue star ", height=48, weights=names[1:3], guidance=2.0)
    *_, (pictures, doubts, columns) = page.draw(asked, lambda done, every: steps.append((done, every)))
    assert columns == 2 and len(pictures) == 8 and steps == [(k, 8) for k in range(1, 9)]
    assert doubts == ["no training caption has blue, in the prompt 'a Blue star'"]
    drawn = [
        expected(run_dir, name, ["a red ring"] * 2 + ["a Blue star"] * 2, guidance=2.0, latent_shape=(16, 6, 8))
        for name in ("step_5_ema", "step_5")
    ]
    for k, (path, caption) in enumerate(pictures):
        assert abs(pixels(path).astype(int) - drawn[k % 2][k // 2]).max() <= 1  # batches of other sizes
        assert caption.startswith(f"{names[1 + k % 2]} · a ") and "seed 3, picture" in caption
    kept = read_settings(pictures[-1][0])
    assert kept["picture"] == 3 and kept["weights"] == "step_5.safetensors" and kept["height"] == 48
    asked = form(prompts="a Blue star", height=48, weights=names[2:3], guidance=2.0, first=kept["picture"])
    *_, ([(again, _)], _, _) = page.draw(asked, lambda *_: None)
    assert abs(pixels(again).astype(int) - pixels(pictures[-1][0])).max() <= 1


def test_what_cannot_be_drawn(run_dir, tmp_path):
    page = Page(AppOptions(str(run_dir)), tmp_path)
    for changed, message in [
        ({"prompts": " \n"}, "at least one prompt"),
        ({"weights": []}, "one checkpoint"),
        ({"weights": ["step 7, averaged"]}, "these weights no longer exist; choose one of step 10"),
        ({"height": 30}, "multiples of"),
        ({"interval_from": 0.9, "interval_to": 0.1}, "two ascending timesteps"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(page.draw(form(**changed), lambda *_: None))
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="plain.png has no settings"):
        read_settings(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="--port is 0"):
        AppOptions("mine", port=0)


FIELDS = "[...document.querySelectorAll('#prompts textarea, #seed input')].map(field => field.value)"
SHOWN = (
    "[...document.querySelectorAll('#pictures .grid-container img')]"
    ".filter(image => image.complete && image.naturalWidth > 0).map(image => image.src)"
)


@pytest.mark.skipif(not chromium(), reason="needs chromium")
def test_in_a_browser(run_dir, tmp_path):
    """A click draws; a picture's settings go back into the form, and draw it again; nothing comes from elsewhere."""
    pytest.importorskip("gradio")
    page, url = serve(AppOptions(str(run_dir), port=free_ports(1)[0]), tmp_path)

    async def use() -> None:
        async with tab(url) as shown:
            await shown.type("#prompts textarea", "\n".join(PROMPTS))
            await shown.type("#seed input", "3")
            await shown.click("#draw")
            first = await shown.until(f"({SHOWN}).length == 2 && {SHOWN}")
            await shown.screenshot(tmp_path / "page.png")
            await shown.type("#prompts textarea", "something else")
            await shown.click("#pictures .gallery-item:nth-child(2) button")
            await shown.until("document.querySelector('#pictures .preview') !== null")
            await shown.click("#back")
            await shown.until(f"({FIELDS})[0] == 'a green star'")
            assert await shown.run(FIELDS) == ["a green star", "3"]
            await shown.click("#draw")
            again = await shown.until(f"({SHOWN}).length == 1 && {SHOWN}")
            assert again[0] not in first
            assert all(address.startswith((url, "data:", "blob:", "about:")) for address in shown.requested)
            assert sum(address.startswith(url) for address in shown.requested) > 20

    try:
        asyncio.run(use())
    finally:
        page.close()
    drawn = expected(run_dir, "step_10_ema", PROMPTS, guidance=3.0, steps=28)
    for name, picture in (("00001", drawn[0]), ("00002", drawn[1]), ("00003", drawn[1])):
        assert abs(pixels(tmp_path / f"{name}.png").astype(int) - picture).max() <= 3  # 28 steps, another batch size
    colours = np.unique(pixels(tmp_path / "page.png").reshape(-1, 4)[:, :3], axis=0)
    assert len(colours) > 1000  # the pictures, not an empty page

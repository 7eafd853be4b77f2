"""The demo's judge accepts correct pictures and rejects others, also after the VAE."""

import numpy as np
import pytest
import torch

from tinyflux.model.tiny import patterns, shapes
from tinyflux.model.tiny.judge import ALL, NEW, Prompt, judge, prompts, score
from tinyflux.model.zoo import ModelZoo
from tinyflux.util.pixels import to_pixels, to_uint8


def picture(prompt: Prompt) -> np.ndarray:
    if prompt.form in shapes.SHAPES:
        return np.asarray(shapes.draw(prompt.first, prompt.form, prompt.second, 64, radius=0.31))
    return np.asarray(patterns.draw(prompt.form, prompt.first, prompt.second))


def test_it_tells_right_from_wrong():
    every = list(prompts())
    assert len(every) == 56 * 8 == len({prompt.text for prompt in every})
    for prompt, other in zip(every[::5], every[3::5], strict=False):
        assert judge(picture(prompt), prompt).right
        assert not judge(picture(other), prompt).right
        swapped = prompt._replace(first=prompt.second, second=prompt.first)
        assert not judge(picture(swapped), prompt).right
    assert not judge(np.full((64, 64, 3), 128, np.uint8), every[0]).right


def test_scores_by_form():
    left_out = shapes.held_out(24)
    wrong = next(p for p in prompts() if (p.first, p.form, p.second) in left_out)
    swapped = wrong._replace(first=wrong.second, second=wrong.first)
    found = score((picture(swapped if prompt == wrong else prompt) for prompt in prompts()), left_out)
    assert list(found) == [*shapes.SHAPES, *patterns.KINDS, ALL, NEW]
    for row, count in {wrong.form: 56, ALL: 448, NEW: 24}.items():
        assert found.pop(row) == (count, count, count - 1)
    assert set(found.values()) == {(56, 56, 56)}
    assert NEW not in score(map(picture, prompts()), frozenset())


def test_the_packaged_vae_keeps_what_is_judged():
    zoo, some = ModelZoo(zoo="tiny"), list(prompts())[::9]
    zoo.load_vae()
    pixels = to_pixels(torch.from_numpy(np.stack([picture(prompt) for prompt in some])))
    seen = to_uint8(zoo.decode_latents(zoo.encode_images(pixels))).permute(0, 2, 3, 1).numpy()
    assert all(judge(image, prompt).right for image, prompt in zip(seen, some, strict=True))


@pytest.mark.parametrize("count", [0, 24])
def test_what_is_held_out_is_never_drawn(count):
    left_out = shapes.held_out(count)
    drawn = {shapes.render(i, leave_out=left_out)[1] for i in range(1500)}
    assert len(left_out) == count and not drawn & {shapes.caption(*each) for each in left_out}
    assert count or len(drawn) > 270

"""Sources of several shapes, captions, overlays and masks in one run: whole batches of one shape on any ranks."""

from collections import Counter

import pytest
import torch

from tests.make_source import make_source, make_tensors
from tinyflux.shards.format import parse_key
from tinyflux.shards.sources import usual_shape
from tinyflux.shards.stream import DataConfig, Stream, open_sources

WIDE, TALL, SQUARE = (2, 8), (8, 2), (4, 4)
CAPTIONS = [1, 3, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with three shapes whose Lune features are in an overlay, and a source with two of the shapes and masks."""
    root = tmp_path_factory.mktemp("shapes")
    base = make_source(
        root / "a", [6, 5, 7, 4, 6], shapes=(SQUARE, WIDE, TALL), captions=CAPTIONS, groups=("latents", "text", "sol")
    )
    overlay = make_source(
        root / "a-lune", [6, 5, 7, 4, 6], shapes=(SQUARE, WIDE, TALL), groups=("lune",), base=base, captions=CAPTIONS
    )
    other = make_source(
        root / "b", [5, 9], dataset_id=2, shapes=(WIDE, SQUARE), groups=("latents", "text", "sol", "lune", "mask")
    )
    return [str(overlay), str(other)]


def stream_of(folders, world=1, rank=0, start_step=0, **options):
    given = {"global_batch_size": 16, "micro_batch_size": 2, "unit": 2, "seed": 5, "threads": 3} | options
    config = DataConfig(folders, **given)
    return Stream(open_sources(config), config, rank, world, start_step=start_step)


def by_slot(stream, steps):
    """{(step, slot): every tensor of that sample} of the next steps."""
    found = {}
    for _ in range(steps * stream.accumulation):
        batch = next(stream)
        assert batch["latents"].shape[2:] in (WIDE, TALL, SQUARE)
        for i, slot in enumerate(batch["slots"].tolist()):
            found[batch["step"], slot] = {name: value[i] for name, value in batch.items() if name != "step"}
    stream.close()
    return found


def of(key, shape, captions):
    dataset_id, index = parse_key(key)
    groups = ("latents", "text", "lune", "sol") + ("mask",) * (dataset_id == 2)
    return make_tensors(index, shape=shape, captions=captions, groups=groups)


def test_each_sample_is_whole_with_one_of_its_captions(folders):
    seen = Counter()
    for sample in by_slot(stream_of(folders), 60).values():
        dataset_id, index = parse_key(sample["keys"])
        assert sample["dataset_ids"] == dataset_id == sample["source_index"] + 1 and sample["local_indices"] == index
        captions = CAPTIONS[index % 3] if dataset_id == 1 else 1
        tensors = of(sample["keys"], tuple(sample["latents"].shape[1:]), captions)
        texts = tensors["t5_embeds"].view(-1, 6, 8), tensors["clip_pooled"].view(-1, 8)
        caption = next(i for i, text in enumerate(texts[0]) if torch.equal(text, sample["t5_embeds"]))
        assert torch.equal(texts[1][caption], sample["clip_pooled"])
        seen[dataset_id, index, caption] += 1
        for name in ("latents", "lune", "sol_stats", "sol_spatial"):
            assert torch.equal(sample[name], tensors[name]), name
        assert sample["mask_mask"] == (dataset_id == 2)
        wanted = tensors["mask"] if dataset_id == 2 else torch.zeros(sample["latents"].shape[1:]).half()
        assert torch.equal(sample["mask"], wanted)
    assert {key[:2] for key in seen} == {(1, i) for i in range(28)} | {(2, i) for i in range(14)}
    assert sum(caption > 0 for _, _, caption in seen) > 20


def test_ranks_and_seeking_do_not_matter(folders):
    whole = by_slot(stream_of(folders, val_fraction=0.2, weights=[1.0, 2.0], weights_at=["4:3,1"]), 9)
    for world in (2, 4, 8):
        parts = {}
        for rank in range(world):
            options = {"val_fraction": 0.2, "weights": [1.0, 2.0], "weights_at": ["4:3,1"]}
            parts |= by_slot(stream_of(folders, world, rank, start_step=3, **options), 6)
        assert parts.keys() == {key for key in whole if key[0] >= 3}
        for key, sample in parts.items():
            for name, value in sample.items():
                same = whole[key][name]
                assert value == same if isinstance(value, str) else torch.equal(value, same), (key, name)


def test_previews_have_the_shape_that_most_samples_have(folders):
    assert usual_shape(open_sources(DataConfig(folders))) == SQUARE


def test_weights_change_at_their_step(folders):
    samples = by_slot(stream_of(folders, weights=[1.0, 0.0], weights_at=["5:1,1", "10:0,1"]), 15)
    shares = [sum(int(samples[step, slot]["source_index"]) for slot in range(16)) for step in range(15)]
    assert shares[:5] == [0] * 5 and 30 <= sum(shares[5:10]) <= 50 and shares[10:] == [16] * 5


def test_validation_is_in_batches_of_one_shape(folders):
    stream = stream_of(folders, val_fraction=0.5)

    def valid(batches):
        return {
            int(batch["slots"][i]): (batch["keys"][i], batch["t5_embeds"][i].tolist())
            for batch in batches
            for i in range(len(batch["keys"]))
            if batch["valid"][i]
        }

    whole = list(stream.validation(4))
    assert len({batch["latents"].shape[2:] for batch in whole}) == 3
    parts = [list(stream.validation(3, rank, 4)) for rank in range(4)]
    assert len({len(part) for part in parts}) == 1
    assert valid(whole) == valid([batch for part in parts for batch in part])
    trained = {sample["keys"] for sample in by_slot(stream, 20).values()}
    assert len(trained) + len(valid(whole)) == 42 and not trained & {key for key, _ in valid(whole).values()}


@pytest.mark.parametrize(
    "options, world, message",
    [
        (
            {"micro_batch_size": 4},
            1,
            "data.unit = 2 must be a multiple of data.micro_batch_size = 4: set data.unit = 4",
        ),
        ({"unit": 8, "micro_batch_size": 4}, 4, "a multiple of ranks x data.unit = 4 x 8 = 32"),
    ],
)
def test_batches_that_would_mix_shapes_are_refused(folders, options, world, message):
    with pytest.raises(ValueError, match=message):
        stream_of(folders, world, **options)

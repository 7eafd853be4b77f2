"""The plan's guarantees, over generated shapes: few and many sources, even and wildly uneven shards."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyflux.shards.plan import PERIOD, Plan, PlanSource, split


@st.composite
def plans(draw, resample="pass", max_total=400):
    count = draw(st.integers(1, 4))
    sources = []
    for i in range(count):
        sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda x: 0 < sum(x) <= max_total))
        sources.append(PlanSource(f"s{i}", i, np.array(sizes)))
    weights = draw(st.lists(st.floats(0.05, 1), min_size=count, max_size=count))
    return Plan(
        sources,
        weights,
        global_batch_size=draw(st.integers(1, 48)),
        seed=draw(st.integers(0, 2**32)),
        slots_per_stream=draw(st.integers(1, 16)),
        resample=resample,
    )


def samples(draws):
    return list(zip(draws.source.tolist(), draws.shard.tolist(), draws.row.tolist(), strict=True))


@settings(max_examples=200, deadline=None)
@given(plans(), st.integers(1, 30))
def test_samples_are_seen_equally_often_and_repeat_only_where_a_pass_ends(plan, steps):
    seen = [np.zeros((len(s.sizes), s.sizes.max()), int) for s in plan.sources]
    for step in range(steps):
        draws = plan.batch(step)
        batch = Counter()
        for (s, shard, row), lap in zip(samples(draws), draws.lap.tolist(), strict=True):
            assert row < plan.sources[s].sizes[shard]
            seen[s][shard, row] += 1
            batch[s, shard, row, lap] += 1
        assert max(batch.values()) == 1
        for counts, source in zip(seen, plan.sources, strict=True):
            real = counts[np.arange(counts.shape[1]) < source.sizes[:, None]]
            assert real.max() - real.min() <= 1


@settings(max_examples=200, deadline=None)
@given(plans(), st.integers(0, 10**7))
def test_each_batch_holds_the_floor_or_ceiling_of_each_share(plan, step):
    counts = np.bincount(plan.batch(step).source, minlength=len(plan.sources))
    assert counts.sum() == plan.global_batch_size
    for count, weight in zip(counts, plan.weights, strict=True):
        share = weight * plan.global_batch_size
        # the edges are rounded to 1/75025 of a sample
        assert math.floor(share - 1 / PERIOD) <= count <= math.ceil(share + 1 / PERIOD)
    for total, weight in zip(plan.start(step), plan.weights, strict=True):
        assert abs(total - step * weight * plan.global_batch_size) <= step / PERIOD + 3


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 3 * PERIOD))
def test_seek_equals_walk(plan, step):
    counts = np.bincount(plan.batch(step).source, minlength=len(plan.sources))
    assert (np.array(plan.start(step)) + counts).tolist() == plan.start(step + 1)
    draws = plan.batch(step)
    for s, first in enumerate(plan.start(step)):
        assert sorted(draws.visit[draws.source == s].tolist()) == list(range(first, first + counts[s]))


@settings(max_examples=100, deadline=None)
@given(plans(resample="replace"), st.integers(0, 10**6))
def test_draws_with_replacement_are_valid_and_repeatable(plan, step):
    draws = plan.batch(step)
    for s, shard, row in samples(draws):
        assert row < plan.sources[s].sizes[shard]
    assert samples(draws) == samples(plan.batch(step))


def test_replacement_draws_every_sample_about_equally_often():
    source = PlanSource("a", 0, np.full(20, 50))
    plan = Plan([source], [1], global_batch_size=100, seed=3, resample="replace")
    counts = Counter(x for step in range(1000) for x in samples(plan.batch(step)))
    seen = np.array(list(counts.values()))
    assert len(seen) == 1000 and seen.mean() == 100
    assert 50 < seen.min() and seen.max() < 150  # binomial: a standard deviation of 10


@settings(max_examples=50, deadline=None)
@given(plans(), st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 8]))
def test_ranks_own_consecutive_slots(plan, step, world):
    G = plan.global_batch_size - plan.global_batch_size % world
    if not G:
        return
    draws = plan.batch(step)
    ranks = [draws[r * G // world : (r + 1) * G // world] for r in range(world)]
    assert [x for rank in ranks for x in samples(rank)] == samples(draws)[:G]


def test_a_lane_reads_shard_after_shard():
    source = PlanSource("a", 0, np.full(64, 100))
    plan = Plan([source], [1], global_batch_size=64, seed=0, slots_per_stream=8)
    assert plan.lanes == (8,)
    for step in range(0, 90, 7):
        assert len(set(plan.batch(step).shard.tolist())) <= 2 * 8


def test_a_far_step_over_many_uneven_shards():
    sizes = np.random.default_rng(0).integers(1, 300, 10_000)
    plan = Plan([PlanSource("a", 0, sizes), PlanSource("b", 1, sizes[::-1])], [0.7, 0.3], global_batch_size=512, seed=1)
    assert len(set(samples(plan.batch(10_000_000)))) == 512


def test_another_seed_is_another_order_and_the_same_seed_is_the_same():
    source = PlanSource("a", 0, np.full(10, 30))
    make = lambda seed: samples(Plan([source], [1], global_batch_size=32, seed=seed).batch(4))  # noqa: E731
    assert make(1) == make(1) != make(2)


def test_version_one_stays_what_it_is():
    plan = Plan(
        [PlanSource("a", 0, np.array([5, 7, 3])), PlanSource("b", 7, np.array([4, 4]))],
        [0.75, 0.25],
        global_batch_size=8,
        seed=1234,
        slots_per_stream=2,
    )
    assert samples(plan.batch(1001)) == [
        (0, 2, 0),
        (0, 1, 4),
        (0, 1, 2),
        (0, 1, 5),
        (1, 1, 0),
        (1, 1, 2),
        (0, 0, 0),
        (0, 0, 1),
    ]


def test_replacement_rows_go_once_around_the_shard():
    plan = Plan([PlanSource("a", 0, np.array([6, 9]))], [1], global_batch_size=4, seed=0)
    draws = plan.batch(3)
    for slot in range(4):
        others = list(plan.replacements(draws, slot))
        assert sorted([*others, int(draws.row[slot])]) == list(range(plan.sources[0].sizes[draws.shard[slot]]))


def test_captions_of_one_image_stay_on_one_side_of_the_split():
    hashes = np.random.default_rng(0).integers(0, 65536, 20_000).astype(np.uint16)
    held = split(hashes, "portraits", 0.1)
    assert 0.08 < held.mean() < 0.12
    for value in np.unique(hashes)[:500]:
        assert len(set(held[hashes == value].tolist())) == 1
    assert not split(hashes, "portraits", 0.0).any()
    assert (split(hashes, "portraits", 0.2) >= held).all()
    assert (split(hashes, "other", 0.1) != held).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": [1, -1]}, "positive"),
        ({"weights": [1]}, "as many weights"),
        ({"resample": "shuffle"}, "'pass' or 'replace'"),
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"weights": [1, 1e-12]}, "too small"),
    ],
)
def test_impossible_plans_are_refused(change, words):
    sources = [PlanSource("a", 0, np.array([3])), PlanSource("b", 1, np.array([3]))]
    with pytest.raises(ValueError, match=words):
        Plan(sources, **{"weights": [1, 1], "global_batch_size": 4, "seed": 0, **change})


def test_sources_need_samples_and_ids_of_their_own():
    with pytest.raises(ValueError, match="'a' has no training samples"):
        PlanSource("a", 0, np.array([0, 0]))
    with pytest.raises(ValueError, match="unique"):
        Plan([PlanSource("a", 0, [1]), PlanSource("b", 0, [1])], [1, 1], global_batch_size=1, seed=0)

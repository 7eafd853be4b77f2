"""The plan's guarantees, over generated sources: few and many, with one shape and several, even and very uneven."""

from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyflux.shards import plan as plan_module
from tinyflux.shards.plan import PERIOD, Plan, PlanSource, split
from tinyflux.util import rng

SHAPES = [(8, 8), (6, 10), (10, 6), (4, 16), (16, 4), (7, 9), (9, 7), (5, 12), (12, 5)]


@st.composite
def plans(draw, resample="pass", max_total=400, max_shapes=4, rank_units=1):
    count, sources = draw(st.integers(1, 4)), []
    for i in range(count):
        sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda x: 0 < sum(x) <= max_total))
        shapes = draw(st.lists(st.sampled_from(SHAPES[:max_shapes]), min_size=1, max_size=max_shapes, unique=True))
        of = draw(st.lists(st.integers(0, len(shapes) - 1), min_size=len(sizes), max_size=len(sizes)))
        sources.append(PlanSource(f"s{i}", i, np.array(sizes), tuple(shapes), np.array(of)))
    weights = st.lists(st.floats(0.05, 1), min_size=count, max_size=count)
    unit = draw(st.integers(1, 8))
    return Plan(
        sources,
        draw(weights),
        global_batch_size=unit * draw(st.integers(1, 12)) * rank_units,
        seed=draw(st.integers(0, 2**32)),
        unit=unit,
        slots_per_stream=draw(st.integers(1, 16)),
        resample=resample,
        weights_at=draw(st.dictionaries(st.integers(1, 25), weights, max_size=2)),
    )


def samples(draws):
    return list(zip(draws.source.tolist(), draws.shard.tolist(), draws.row.tolist(), strict=True))


def cells(plan):
    """{(source, shape index): {(shard, row), ...}}: every training sample."""
    found = defaultdict(set)
    for s, source in enumerate(plan.sources):
        for shard, size in enumerate(source.sizes.tolist()):
            shape = source.shapes[source.shape_of[shard]]
            if size:
                found[s, plan.shapes.index(shape)] |= {(shard, row) for row in range(size)}
    return found


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(1, 30))
def test_samples_of_a_shape_of_a_source_are_seen_equally_often_and_in_their_share(plan, steps):
    every, B = cells(plan), plan.unit
    seen, due = {cell: Counter() for cell in every}, dict.fromkeys(every, Fraction(0))
    totals = {s: sum(len(x) for (t, _), x in every.items() if t == s) for s in range(len(plan.sources))}
    for step in range(steps):
        draws = plan.batch(step)
        assert draws.slot.tolist() == list(range(plan.global_batch_size))
        shapes = draws.shape.reshape(-1, B)
        assert (shapes == shapes[:, :1]).all()  # a unit has one shape
        for s, b, shard, row in zip(draws.source, draws.shape, draws.shard, draws.row, strict=True):
            seen[s, b][int(shard), int(row)] += 1
        for (s, b), rows in every.items():
            counts = seen[s, b]
            assert counts.keys() <= rows
            assert max(counts.values(), default=0) - (min(counts.values()) if len(counts) == len(rows) else 0) <= 1
            share = Fraction(plan.weights(step)[s]) * len(rows) / totals[s]
            due[s, b] += share * plan.global_batch_size
            stretches = sum(first <= step for first in plan.weights_at)
            assert abs(counts.total() - due[s, b]) <= 3 * (B + 1) * stretches


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 2**40))
def test_shares_hold_for_ever_and_seek_equals_walk(plan, step):
    (done, done_after), (taken, taken_after) = plan.counts(step, 1)
    units, counts = done_after - done, taken_after - taken
    draws = plan.batch(step)
    assert np.bincount(draws.shape, minlength=len(units)).tolist() == (units * plan.unit).tolist()
    assert (np.array(plan.start(step)) + np.bincount(draws.source, minlength=len(plan.sources))).tolist() == plan.start(
        step + 1
    )
    for (s, b), first, count in zip(sorted(cells(plan), key=lambda c: c[::-1]), taken, counts, strict=True):
        mine = (draws.source == s) & (draws.shape == b)
        assert sorted(draws.visit[mine].tolist()) == list(range(first, first + count))
    last = max(plan.weights_at)
    if step > last:  # of what the last weights gave, nothing drifts away
        since = np.array(plan.start(step)) - np.array(plan.start(last))
        # edges are rounded to 1/PERIOD: the units of each shape in a step, and the samples in each of its units
        rounded = len(plan.shapes) * plan.unit + plan.global_batch_size // plan.unit
        drift = (step - last) * rounded / PERIOD
        for got, weight in zip(since, plan.weights(step), strict=True):
            assert abs(got - weight * (step - last) * plan.global_batch_size) <= 3 * (plan.unit + 1) * 4 + drift


@settings(max_examples=40, deadline=None)
@given(plans(rank_units=8), st.one_of(st.integers(0, 30), st.integers(0, 2**40)), st.sampled_from([2, 4, 8]))
def test_ranks_own_consecutive_slots_and_locate_nothing_else(plan, step, world):
    whole, G = samples(plan.batch(step)), plan.global_batch_size
    ranks = [plan.batch(step, rank, world) for rank in range(world)]
    assert [x for rank in ranks for x in samples(rank)] == whole
    assert [slot for rank in ranks for slot in rank.slot.tolist()] == list(range(G))
    several = plan.batch(step, 1, world, steps=30)
    singly = [plan.batch(n, 1, world) for n in range(step, step + min(30, plan.portion))]
    for name in ("step", "slot", "source", "shard", "row", "visit", "place"):
        assert getattr(several, name).tolist() == [x for d in singly for x in getattr(d, name).tolist()]
    shards = plan.batch(step, 1, world, rows=False)
    assert shards.shard.tolist() == ranks[1].shard.tolist() and not shards.row.any()


@settings(max_examples=40, deadline=None)
@given(plans(resample="replace"), st.integers(0, 10**6))
def test_draws_with_replacement_are_valid_and_repeatable(plan, step):
    draws = plan.batch(step)
    for s, shard, row in samples(draws):
        assert row < plan.sources[s].sizes[shard]
    assert samples(draws) == samples(plan.batch(step))


def test_replacement_draws_every_sample_about_equally_often():
    source = PlanSource("a", 0, np.full(20, 50))
    plan = Plan([source], [1], global_batch_size=1000, seed=3, resample="replace")
    counts = Counter(x for step in range(100) for x in samples(plan.batch(step)))
    seen = np.array(list(counts.values()))
    assert len(seen) == 1000 and seen.mean() == 100
    assert 50 < seen.min() and seen.max() < 150  # binomial: a standard deviation of 10


def readers(plan, world, steps):
    """How many ranks read each shard in each pass over its source's shape, on average."""
    ranks = defaultdict(set)
    totals = {cell: len(rows) for cell, rows in cells(plan).items()}
    for step in range(steps):
        draws = plan.batch(step, rows=False)
        owner = draws.slot * world // plan.global_batch_size
        for rank, s, b, shard, visit in zip(owner, draws.source, draws.shape, draws.shard, draws.visit, strict=True):
            ranks[s, shard, visit // totals[s, b]].add(rank)
    return np.mean([len(found) for found in ranks.values()])


def test_a_rank_reads_its_own_lanes():
    plan = Plan([PlanSource("a", 0, np.full(256, 20))], [1], global_batch_size=64, seed=0, unit=8)
    assert list(plan.lanes.values()) == [16]
    assert readers(plan, 8, steps=160) == 1
    nine = PlanSource("a", 0, np.full(360, 32), tuple(SHAPES), np.arange(360) % 9)
    plan = Plan([nine], [1], global_batch_size=256, seed=0, unit=8)
    assert readers(plan, 8, steps=90) <= 2.5


def design_effect(classes, plan, steps):
    """Variance of a batch's class means against that of independent draws: 1 is a perfectly mixed batch."""
    G, draws = plan.global_batch_size, [plan.batch(3 * n) for n in range(steps)]
    means = np.array([np.bincount(classes[d.shard, d.row], minlength=10) for d in draws])
    return (means / G).var(axis=0).sum() / (10 * 0.1 * 0.9 / G)


def test_lanes_mix_as_slots_per_stream_says():
    shards, size = 1000, 100
    folder = np.arange(shards * size) * 10 // (shards * size)  # ten classes, one after the other
    mixed = folder[rng.permutation(len(folder), "inputs")].reshape(shards, size)
    plan = Plan([PlanSource("a", 0, np.full(shards, size))], [1], global_batch_size=256, seed=1, unit=8)
    assert list(plan.lanes.values()) == [64]
    assert max(Counter(plan.batch(7).shard.tolist()).values()) <= 4
    assert design_effect(mixed, plan, 130) <= 2
    assert design_effect(folder.reshape(shards, size), plan, 130) <= 6  # what shards of one class cost


def test_a_billion_samples_in_four_million_shards():
    sizes = np.random.default_rng(0).integers(200, 301, 4_000_000)
    plan = Plan([PlanSource("a", 0, sizes)], [1], global_batch_size=512, seed=1, unit=8)
    assert len(set(samples(plan.batch(2**40)))) == 512


def test_orders_of_shards_are_bounded_by_bytes(monkeypatch):
    monkeypatch.setattr(plan_module, "ORDER_BYTES", 5000)
    plan = Plan([PlanSource("a", 0, np.full(100, 2))], [1], global_batch_size=10, seed=1)
    before = samples(plan.batch(0))
    for step in range(0, 2000, 20):
        plan.batch(step)
    assert sum(x.nbytes for line in plan._lines.values() for x in line) <= 5000
    assert samples(plan.batch(0)) == before


def test_another_seed_is_another_order_and_the_same_seed_is_the_same():
    source = PlanSource("a", 0, np.full(10, 30))
    make = lambda seed: samples(Plan([source], [1], global_batch_size=32, seed=seed).batch(4))  # noqa: E731
    assert make(1) == make(1) != make(2)


def test_version_two_stays_what_it_is():
    plan = Plan(
        [PlanSource("a", 0, [5, 7, 3], ((8, 8), (6, 10)), [0, 1, 0]), PlanSource("b", 7, [4, 4], ((8, 8),))],
        [0.75, 0.25],
        global_batch_size=8,
        seed=1234,
        unit=2,
        slots_per_stream=2,
        weights_at={100: [0.5, 0.5]},
    )
    assert samples(plan.batch(1001)) == PINNED


PINNED = [(1, 1, 3), (1, 1, 0), (0, 1, 6), (0, 1, 2), (1, 1, 1), (0, 0, 1), (1, 0, 2), (1, 0, 0)]


@settings(max_examples=50, deadline=None)
@given(plans(), st.integers(0, 50))
def test_replacements_go_on_in_the_shard_and_then_through_the_pass(plan, step):
    draws = plan.batch(step)
    for i in range(0, len(draws), 5):
        s, b, shard = int(draws.source[i]), int(draws.shape[i]), int(draws.shard[i])
        others = list(plan.replacements(draws, i))
        assert sorted([*others, (shard, int(draws.row[i]))]) == sorted(cells(plan)[s, b])
        size = plan.sources[s].sizes[shard]
        assert {other for other, _ in others[: size - 1]} <= {shard}
        follow = np.flatnonzero(draws.place == draws.place[i] + 1)
        same = [j for j in follow if (draws.source[j], draws.shape[j], draws.shard[j]) == (s, b, shard)]
        assert all(
            (shard, int(draws.row[j])) == others[0]
            for j in same
            if draws.visit[j] // len(cells(plan)[s, b]) == draws.visit[i] // len(cells(plan)[s, b])
        )


def test_weights_may_be_zero_for_a_while():
    sources = [PlanSource("a", 0, [30, 30]), PlanSource("b", 1, [20], ((6, 10),))]
    plan = Plan(sources, [1, 0], global_batch_size=8, seed=0, unit=2, weights_at={10: [1, 3], 20: [0, 1]})
    assert plan.start(10) == [80, 0] and plan.start(20) == [100, 60] and plan.start(21) == [100, 68]
    assert plan.weights(9) == (1, 0) and plan.weights(10) == (0.25, 0.75)
    assert plan.batch(2**40).source.tolist() == [1] * 8


def test_the_rarest_shape_is_not_dropped():
    sizes, of = np.append(np.full(1000, 10_000), 1), np.append(np.zeros(1000, int), 1)
    plan = Plan([PlanSource("a", 0, sizes, tuple(SHAPES[:2]), of)], [1], global_batch_size=8, seed=0, unit=8)
    assert plan.counts(PERIOD)[0].tolist() == [[1, PERIOD - 1]]


def test_captions_of_one_image_stay_on_one_side_of_the_split():
    hashes = np.random.default_rng(0).integers(0, 2**32, 20_000).astype(np.uint32)
    held = split(np.repeat(hashes, 2), "portraits", 0.1)
    assert 0.08 < held.mean() < 0.12 and (held[::2] == held[1::2]).all()
    assert not split(hashes, "portraits", 0.0).any()
    assert (split(hashes, "portraits", 0.2) >= split(hashes, "portraits", 0.1)).all()
    assert (split(hashes, "other", 0.1) != held[::2]).any()
    many = np.random.default_rng(1).integers(0, 2**32, 2_000_000).astype(np.uint32)
    assert abs(split(many, "portraits", 1e-3).mean() / 1e-3 - 1) < 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": [1, -1]}, "positive"),
        ({"weights": [0, 0]}, "positive"),
        ({"weights": [1]}, "2 sources need 2 weights"),
        ({"weights_at": {5: [1]}}, "2 sources need 2 weights"),
        ({"weights_at": {0: [1, 1]}}, "weights_at has step 0"),
        ({"resample": "shuffle"}, "'pass' or 'replace'"),
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"unit": 3}, "unit must divide global_batch_size = 4"),
        ({"slots_per_stream": 0}, "slots_per_stream"),
    ],
)
def test_impossible_plans_are_refused(change, words):
    sources = [PlanSource("a", 0, np.array([3])), PlanSource("b", 1, np.array([3]))]
    with pytest.raises(ValueError, match=words):
        Plan(sources, **{"weights": [1, 1], "global_batch_size": 4, "seed": 0, **change})


def test_a_source_may_list_many_shapes():
    shapes = tuple((8, 8 + i) for i in range(300))
    plan = Plan([PlanSource("a", 1, np.array([3, 4]), shapes, np.array([299, 40]))], [1], global_batch_size=2, seed=0)
    assert plan.shapes == (shapes[40], shapes[299])


def test_sources_need_samples_and_ids_of_their_own():
    with pytest.raises(ValueError, match="'a' has no training samples"):
        PlanSource("a", 0, np.array([0, 0]))
    with pytest.raises(ValueError, match="unique"):
        Plan([PlanSource("a", 0, [1]), PlanSource("b", 0, [1])], [1, 1], global_batch_size=1, seed=0)

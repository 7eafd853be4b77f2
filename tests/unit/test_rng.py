"""Counter-based randomness: known values, and draws that depend only on their key."""

import numpy as np
import torch

from tinyflux.util import rng


def test_splitmix64_known_answers():
    # the first outputs of the reference generator seeded with 0 and 1234567
    assert rng.splitmix64(np.uint64(0)) == 0xE220A8397B1DCDAF
    assert rng.splitmix64(np.uint64(1234567)) == 6457827717110365317


def test_torch_and_numpy_hash_alike():
    x = np.random.default_rng(0).integers(-(2**63), 2**63, 1000)
    assert (rng._mix(torch.from_numpy(x)).numpy().view(np.uint64) == rng.splitmix64(x.view(np.uint64))).all()


def test_keys_tell_their_parts_apart():
    keys = [rng.key(*parts) for parts in [(), (0,), (0, 0), (1,), (-1,), ("1",), ("ab", "c"), ("a", "bc"), ("abc",)]]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**64 for k in keys)


def test_permutation_is_one():
    assert sorted(rng.permutation(1000, 3, "rows").tolist()) == list(range(1000))
    assert (rng.permutation(1000, 3, "rows") != rng.permutation(1000, 4, "rows")).any()


def test_a_large_permutation_is_that_of_a_small_one(monkeypatch):
    parts = (77_777, 3, "shards")
    whole = rng.permutation(*parts)
    monkeypatch.setattr(rng, "_LARGE", 1000)
    assert (rng.permutation(*parts) == whole).all()


def test_a_draw_does_not_depend_on_its_neighbours():
    seeds = torch.from_numpy(rng.sample_seeds(7, 100, np.arange(16)))
    whole = rng.normal(seeds, "noise", (3, 5))
    assert torch.equal(whole[4:9], rng.normal(seeds[4:9], "noise", (3, 5)))
    assert not torch.equal(whole, rng.normal(seeds, "other", (3, 5)))
    assert torch.equal(seeds[3:5], torch.from_numpy(rng.sample_seeds(7, 100, np.arange(3, 5))))


def test_distributions():
    seeds = torch.from_numpy(rng.sample_seeds(0, 0, np.arange(400)))
    x = rng.normal(seeds, "x", (501,))
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.1
    u = rng.uniform(seeds, "u", (500,))
    assert 0 <= u.min() and u.max() < 1
    assert (torch.histc(u, 20, 0, 1) / u.numel() - 0.05).abs().max() < 0.003
    assert abs(torch.corrcoef(torch.stack((x[:, 0], x[:, 1])))[0, 1]) < 0.15

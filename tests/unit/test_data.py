"""Caches in a DataLoader."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.make_source import make_source, make_tensors
from tinyflux.trainer.cache_experts import DatasetCache
from tinyflux.trainer.data import CachedDataset, MultiCachedDataset, collate_fn


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return [DatasetCache.load(make_source(root / name, counts, name)) for name, counts in (("a", (5,)), ("b", (3, 4)))]


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (1, "spawn")])
def test_batches_have_the_format(caches, workers, method):
    dataset = CachedDataset(caches[1], dataset_id=3)
    options = {"collate_fn": collate_fn, "num_workers": workers, "multiprocessing_context": method}
    batches = list(DataLoader(dataset, batch_size=4, **options))
    assert [len(batch["latents"]) for batch in batches] == [4, 3]
    batch = batches[0]
    assert list(batch) == ["latents", "t5_embeds", "clip_pooled", "local_indices", "dataset_ids", "masks"]
    assert batch["latents"].shape == (4, 4, 4, 4) and batch["latents"].dtype == torch.float32
    assert batch["t5_embeds"].shape == (4, 6, 8) and batch["clip_pooled"].shape == (4, 8)
    assert batch["local_indices"].tolist() == [0, 1, 2, 3] and batch["dataset_ids"].tolist() == [3] * 4
    assert batch["masks"] is None and batch["local_indices"].dtype == batch["dataset_ids"].dtype == torch.int64
    for i in range(4):
        assert torch.equal(batch["latents"][i], make_tensors(i)["latents"].float())
        assert torch.equal(batch["t5_embeds"][i], make_tensors(i)["t5_embeds"].float())


def test_several_caches_keep_their_ids(caches):
    dataset = MultiCachedDataset(dtype=torch.bfloat16)
    dataset.add(caches[0], dataset_id=0)
    dataset.add(caches[1], dataset_id=2)
    assert len(dataset) == 12
    batch = next(iter(DataLoader(dataset, batch_size=12, collate_fn=collate_fn)))
    assert batch["dataset_ids"].tolist() == [0] * 5 + [2] * 7
    assert batch["local_indices"].tolist() == [*range(5), *range(7)]
    assert batch["latents"].dtype == torch.bfloat16
    assert torch.equal(batch["clip_pooled"][11], make_tensors(6)["clip_pooled"].bfloat16())
    t = torch.rand(12)
    lune = dataset.get_multi_source_cache().get_lune(batch["local_indices"], batch["dataset_ids"], t)
    assert torch.equal(lune[11:], caches[1].get_lune([6], t[11:]))
    for i in (-1, 12):
        with pytest.raises(IndexError, match=f"sample {i} is out of range: the caches have 12"):
            dataset[i]

"""The stream yields the plan's samples, complete and in order, on any number of ranks and from any step."""

import gc
import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from tests.make_source import make_source, make_tensors
from tests.streams import config_of, stream_of, take
from tests.training import environment
from tinyflux.shards.format import parse_key
from tinyflux.shards.stream import DataConfig, Stream, open_sources
from tinyflux.util import rng
from tinyflux.util.files import Stopped

COUNTS = {"portraits": (5, 3, 4), "places": (6, 1, 2, 7)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return [
        str(make_source(root / name, counts, name, dataset_id))
        for dataset_id, (name, counts) in enumerate(COUNTS.items(), 1)
    ]


def by_slot(batches):
    """{(step, slot): everything that belongs to that sample} of raw batches."""
    rows = {}
    for batch in batches:
        for i, slot in enumerate(batch["slots"].tolist()):
            key = (batch["step"], slot)
            assert key not in rows
            rows[key] = {name: value[i] for name, value in batch.items() if name != "step"}
    return rows


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        for name in a[key]:
            x, y = a[key][name], b[key][name]
            assert x == y if isinstance(x, str) else torch.equal(x, y), (key, name)


def test_batches_hold_the_samples_that_they_name(folders):
    config = config_of(folders)
    with stream_of(config) as stream:
        for n, batch in enumerate(take(stream, 12)):
            assert batch["step"] == n // 4
            assert batch["slots"].tolist() == [n % 4 * 2, n % 4 * 2 + 1]
            assert torch.equal(
                batch["sample_seeds"], torch.from_numpy(rng.sample_seeds(5, n // 4, batch["slots"].numpy()))
            )
            for i, key in enumerate(batch["keys"]):
                dataset_id, index = parse_key(key)
                assert batch["dataset_ids"][i] == dataset_id == batch["source_index"][i] + 1
                assert batch["local_indices"][i] == index
                for name, tensor in make_tensors(index).items():
                    assert torch.equal(batch[name][i], tensor), name
        assert (
            stream.stats.samples
            == np.bincount(np.concatenate([stream.plan.batch(step).source for step in range(3)]), minlength=2).tolist()
        )


def test_follows_the_plan_and_sees_every_sample_equally_often(folders):
    config = config_of(folders[:1], global_batch_size=4, micro_batch_size=4)
    with stream_of(config) as stream:
        for _ in range(3):
            seen = torch.cat([batch["local_indices"] for batch in take(stream, 3)])
            assert sorted(seen.tolist()) == list(range(12))


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0.3}, {"resample": "replace"}, {"slots_per_stream": 1}])
def test_rank_count_does_not_matter(folders, options):
    config = config_of(folders, **options)
    whole = by_slot(take(stream_of(config), 5 * 4))
    for world in (2, 4):
        parts = {}
        for rank in range(world):
            with stream_of(config, rank=rank, world=world) as stream:
                assert stream.accumulation == 4 // world
                mine = by_slot(take(stream, 5 * stream.accumulation))
            assert {slot // (8 // world) for _, slot in mine} == {rank}
            parts |= mine
        assert_equal(parts, whole)


def test_threads_chunks_and_micro_batches_do_not_matter(folders):
    whole = by_slot(take(stream_of(config_of(folders)), 5 * 4))
    for options in ({"threads": 1}, {"threads": 5, "prefetch": 7}, {"micro_batch_size": 8}, {"open_shards": 1}):
        config = config_of(folders, **options)
        assert_equal(by_slot(take(stream_of(config), 5 * 8 // config.micro_batch_size)), whole)


def test_seeking_equals_walking(folders):
    config = config_of(folders)
    walked = take(stream_of(config), 30 * 4)
    for step in (1, 7, 29):
        assert_equal(by_slot(take(stream_of(config, start_step=step), 4)), by_slot(walked[step * 4 : step * 4 + 4]))


def test_state_is_the_step(folders):
    config = config_of(folders)
    stream = stream_of(config)
    batches = take(stream, 4 * 3 + 1)
    assert stream.state_dict() == {"step": 3}  # step 3 was returned in part and starts again
    other = stream_of(config)
    take(other, 2)
    other.load_state_dict(stream.state_dict())
    assert_equal(by_slot(take(other, 1)), by_slot(batches[12:]))
    far = stream_of(config, start_step=10_000_000)
    assert next(far)["step"] == 10_000_000
    assert far.state_dict() == {"step": 10_000_000}


def running(name):
    return name in {thread.name for thread in threading.enumerate()}


def ends(name):
    """Whether a thread has ended after 120 s at most."""
    deadline = time.monotonic() + 120
    while running(name) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(name)


def test_closing_stops_the_threads_and_may_go_on(folders):
    stream = stream_of(config_of(folders, threads=9))
    batches = take(stream, 3)
    assert running("stream-8")
    stream.close()
    assert ends("stream-8")
    assert_equal(by_slot(batches + take(stream, 5)), by_slot(take(stream_of(config_of(folders)), 8)))
    stream.close()
    stream.close()


def test_another_thread_may_close_at_any_line(folders):
    stream, left = stream_of(config_of(folders, threads=9)), 0

    def step(frame, event, _):
        nonlocal left
        if frame.f_code is Stream.__next__.__code__:
            left -= event == "line"
            if left == 0:
                stream.close()
            return step

    for line in range(1, 25):
        left = line
        sys.settrace(step)
        with suppress(Stopped):
            next(stream)
        sys.settrace(None)
    stream.close()
    assert ends("stream-8")


def test_a_forgotten_stream_stops_its_threads(folders):
    stream = stream_of(config_of(folders, threads=9))
    next(stream)
    assert running("stream-8")
    del stream
    gc.collect()
    assert ends("stream-8")


def test_the_interpreter_ends_with_a_stream_open(folders):
    code = "import sys; from tests.unit.test_stream import *; s = stream_of(config_of(sys.argv[1:])); next(s); next(s)"
    argv = [sys.executable, "-c", code, *folders]  # a forked one would not free its objects
    done = subprocess.run(argv, env=environment(), stdout=-1, stderr=-2, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_kept_batch_is_not_overwritten(folders):
    config = config_of(folders, micro_batch_size=8)
    with stream_of(config) as stream:
        kept = [{"latents": batch["latents"], "keys": batch["keys"]} for batch in take(stream, 3)]
        copies = [batch["latents"].clone() for batch in kept]
        take(stream, 20)
        for batch, copy in zip(kept, copies, strict=True):
            assert torch.equal(batch["latents"], copy)


def test_batch_memory_is_used_again(folders):
    with stream_of(config_of(folders, micro_batch_size=8)) as stream:
        places = {next(stream)["latents"].data_ptr() for _ in range(60)}
    assert len(places) < 20


def test_collate_runs_and_its_error_surfaces(folders):
    def collate(raw):
        if raw["step"] == 2:
            raise ArithmeticError("cannot collate step 2")
        return raw["step"], sorted(raw)

    with stream_of(config_of(folders, micro_batch_size=8), collate=collate) as stream:
        assert [step for step, _ in take(stream, 2)] == [0, 1]
        for _ in range(2):  # again, not a hang and not the next batch
            with pytest.raises(ArithmeticError, match="cannot collate step 2"):
                next(stream)


def test_an_exit_in_a_collate_reaches_the_consumer(folders):
    def collate(raw):
        raise SystemExit(3)

    with stream_of(config_of(folders), collate=collate) as stream, pytest.raises(SystemExit):
        next(stream)


def test_a_stream_is_refused_after_a_fork(folders):
    with stream_of(config_of(folders)) as stream:
        next(stream)
        child = os.fork()
        if not child:
            try:
                next(stream)
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        next(stream)


def test_the_last_step_ends_the_stream(folders):
    with stream_of(config_of(folders), end_step=2) as stream:
        assert [batch["step"] for batch in stream] == [0] * 4 + [1] * 4


def test_wait_is_measured(folders):
    with stream_of(config_of(folders), collate=lambda raw: time.sleep(0.05)) as stream:
        next(stream)
        assert stream.stats.last_wait >= 0.05
        first = stream.stats.wait
        take(stream, 4)
        assert stream.stats.wait > first


def test_weights(folders):
    with stream_of(config_of(folders, weights=[3.0, 1.0])) as stream:
        take(stream, 40)
        assert stream.stats.samples == [60, 20]
    with stream_of(config_of(folders)) as stream:  # by sample count: 12 and 16
        take(stream, 28 * 4)
        assert stream.stats.samples == [96, 128]


def test_held_out_images_are_never_trained_on(folders):
    config = config_of(folders, val_fraction=0.4)
    stream = stream_of(config)
    trained = {key for batch in take(stream, 30 * 4) for key in batch["keys"]}
    stream.close()
    batches = list(stream.validation(3))
    held_out = [key for batch in batches for key, valid in zip(batch["keys"], batch["valid"], strict=True) if valid]
    assert len(held_out) == len(set(held_out)) > 0
    assert not trained & set(held_out)
    assert len(trained) + len(held_out) == 28
    images = [{(d, i // 2) for d, i in map(parse_key, keys)} for keys in (trained, held_out)]
    assert not images[0] & images[1]  # both captions of an image are on one side
    for batch in batches:
        for i, key in enumerate(batch["keys"]):
            assert torch.equal(batch["latents"][i], make_tensors(parse_key(key)[1])["latents"])


def test_validation_is_the_same_every_time_and_on_every_rank_count(folders):
    stream = stream_of(config_of(folders, val_fraction=0.4))

    def valid_rows(batches):
        return {
            slot: (key, seed)
            for batch in batches
            for slot, key, seed, valid in zip(
                *(batch[name] for name in ("slots", "keys", "sample_seeds", "valid")), strict=True
            )
            if valid
        }

    whole = {int(k): v for k, v in valid_rows(stream.validation(4)).items()}
    ranks = [list(stream.validation(2, rank, 3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1  # equally many batches, or collectives would hang
    assert {len(batch["keys"]) for batches in ranks for batch in batches} == {2}
    parts = {int(k): v for batches in ranks for k, v in valid_rows(batches).items()}
    assert parts == whole
    assert list(stream_of(config_of(folders)).validation(4)) == []


def test_pins_and_keeps_order_on_a_gpu(folders):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    config = config_of(folders)
    with stream_of(config, device="cuda") as stream:
        batches = take(stream, 8)
    assert all(batch["latents"].is_pinned() for batch in batches)
    assert_equal(by_slot(batches), by_slot(take(stream_of(config), 8)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"global_batch_size": 0}, "data.global_batch_size is 0"),
        ({"micro_batch_size": -1}, "data.micro_batch_size is -1"),
        ({"threads": 0}, "data.threads is 0"),
        ({"val_fraction": 1.0}, r"data.val_fraction is 1.0: it must be in \[0, 1\)"),
        ({"resample": "shuffle"}, "data.resample is 'shuffle': it must be one of pass, replace"),
        ({"weights": [1.0]}, "data.weights has 1 entries for 2 sources"),
        ({"weights": [1.0, float("nan")]}, "data.weights is .* it must be at least 0"),
        ({"weights": [0.0, 0.0]}, "data.weights is .* more than zero for one source"),
        ({"weights_at": ["10:1"]}, "data.weights_at is '10:1.0': it must be of 2 weights"),
        ({"weights_at": ["0:1,1"]}, "data.weights_at is .* of step 1 or later"),
        ({"weights_at": ["ten:1,1"]}, "data.weights_at is .* STEP:WEIGHT"),
        ({"weights_at": ["10:1,0", "10:0,1"]}, "data.weights_at is .* one entry a step"),
        ({"weights_at": ["10:1,x"]}, "data.weights_at is .* STEP:WEIGHT"),
        ({"unit": 3}, "data.unit is 3: it must be a divisor of data.global_batch_size = 8"),
        ({"dataset_ids": [1]}, "data.dataset_ids has 1 entries for 2 sources"),
        ({"dataset_ids": [1, -2]}, "data.dataset_ids is"),
        ({"max_bad_samples": -1}, "data.max_bad_samples is -1"),
    ],
)
def test_impossible_configs_are_refused_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        config_of(["a", "b"], **options)


def test_batch_sizes_that_do_not_divide_are_refused(folders):
    config = config_of(folders, global_batch_size=12, micro_batch_size=4)
    with pytest.raises(ValueError, match="data.global_batch_size is 12.* 2 x 4 = 8"):
        stream_of(config, rank=0, world=2)


def test_sources_are_found_or_named(folders, tmp_path):
    for url, error, message in [
        ("pipe:cat x.tar", ValueError, "scheme 'pipe' is not accepted"),
        ("ftp://host/x", ValueError, "scheme 'ftp' is not accepted; a source is a folder"),
        (str(tmp_path / "nowhere"), FileNotFoundError, "there is no folder .*nowhere"),
        (str(tmp_path), FileNotFoundError, "neither manifest.json nor"),
    ]:
        with pytest.raises(error, match=message):
            open_sources(DataConfig([url]))
    assert open_sources(DataConfig([f"file://{folders[0]}"]))[0].name == "portraits"


def test_open_files_are_bounded(tmp_path):
    folder = make_source(tmp_path / "many", [1] * 40)
    config = config_of([str(folder)], open_shards=3, global_batch_size=2, threads=1)
    with stream_of(config) as stream:
        for _ in range(20):
            next(stream)
            shards = [name for name in map(link, os.listdir("/proc/self/fd")) if name.startswith(str(folder))]
            assert len(shards) <= 3 + 2  # the open ones, and two in the hands of the thread


def test_a_shard_of_each_lane_may_stay_open(tmp_path):
    folder = make_source(tmp_path / "many", [3] * 40)
    config = config_of([str(folder)], open_shards=1, slots_per_stream=1, global_batch_size=16)
    assert stream_of(config)._reader.shards.limit >= 16
    assert 8 <= stream_of(config, world=2)._reader.shards.limit < 16


def link(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # closed between the listing and now
        return ""


def test_a_clean_run_logs_nothing(folders, caplog):
    with caplog.at_level(logging.INFO), stream_of(config_of(folders)) as stream:
        take(stream, 20)
    assert caplog.records == [] and stream.stats.bad == stream.stats.replaced == 0

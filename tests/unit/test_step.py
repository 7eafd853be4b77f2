"""A step never makes the host wait for the device, except for one list of numbers that is read a step later."""

import gc

import pytest
import torch

from tests.reads import Reads
from tests.training import make_source, records, train
from tinyflux.trainer import trainer as module
from tinyflux.trainer.step import Stepper
from tinyflux.util.garbage import ALL, YOUNG, collected_by_steps

STEPS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("sources") / "a", 1, shapes=((4, 4), (2, 8)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_waits_once_and_sums_once(source, tmp_path, monkeypatch, optimizer):
    """Without batches, which the stream's threads make."""
    launched, read, validated = Reads(), Reads(), Reads()
    call, read_step, validate = Stepper.__call__, Stepper.read, module.validate

    def launch(self, batches, step, accumulation, **told):
        ready = [next(batches) for _ in range(accumulation)]
        with launched.counted():
            return call(self, iter(ready), step, accumulation, **told)

    def counted_read(self, pending):
        with read.counted():
            return read_step(self, pending)

    def counted_validation(objective, ema, batches, *where):
        ready = list(batches)
        with validated.counted():
            return validate(objective, ema, ready, *where)

    monkeypatch.setattr(Stepper, "__call__", launch)
    monkeypatch.setattr(Stepper, "read", counted_read)
    monkeypatch.setattr(module, "validate", counted_validation)
    options = ("--trainer.optimizer", optimizer, "--trainer.max-loss-spike", 3, "--trainer.total-steps", STEPS)
    options += ("--data.unit", 2, "--data.micro-batch-size", 2)
    options += ("--data.val-fraction", 0.5, "--trainer.validate-every", STEPS)
    done = train(tmp_path / "run", [source], *options)
    assert done.returncode == 0 and len(records(tmp_path / "run")) == STEPS, done.stdout
    assert not launched.reads and not launched.waits, (launched.reads, launched.waits)
    assert read.reads == {"tolist": STEPS} and not read.waits
    assert validated.reads == {"tolist": 1} and not validated.waits, (validated.reads, validated.waits)
    assert launched.operations["allreduce_"] == STEPS and validated.operations["allreduce_"] == 1


def test_garbage_is_collected_by_the_clock_of_steps():
    generations = []
    note = lambda phase, info: generations.append(info["generation"]) if phase == "start" else None  # noqa: E731
    with collected_by_steps() as collect:
        assert not gc.isenabled()
        gc.callbacks.append(note)
        try:
            for step in range(1, ALL + 1):
                collect(step)
        finally:
            gc.callbacks.remove(note)
    assert gc.isenabled() and generations == [1] * (ALL // YOUNG - 1) + [2]


def test_a_deterministic_run_has_no_kernel_that_is_not(source, tmp_path):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        options = ("--trainer.deterministic", "--trainer.total-steps", 2, "--data.unit", 2)
        options += ("--data.micro-batch-size", 2, "--trainer.profile-at", 2)  # five steps, of which there is one
        done = train(tmp_path / "run", [source], *options)
        assert done.returncode == 0 and torch.are_deterministic_algorithms_enabled(), done.stdout
        assert (tmp_path / "run" / "profile_step_2.json.gz").stat().st_size > 1000
    finally:
        torch.use_deterministic_algorithms(before)

"""Whole runs whose clients stage their blocks on a fake GPU with late streams: bit for bit what the rules say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import fake_device
import pytest
import torch
from fake_device import FakeDevice, control
from federations import ONE, TWO, Case, assert_equal, mlp, regression, sgd, squared_error
from harness import run_federation

from parablock_rt.client import joining
from parablock_rt.client.replica import Replica
from parablock_rt.errors import DigestError
from parablock_rt.staging import pinned
from parablock_rt.staging.device_stager import DeviceStager
from parablock_rt.staging.pinned import PinnedMemory

SLICE = 256
_DELAY_US = 500


@pytest.fixture
def on_a_late_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeDevice]]:
    """Every client of this process gets a fake GPU; what it applied is checked a round later, as on a real one."""
    control().fake_reset()
    control().fake_delay(_DELAY_US, 1)
    devices: list[FakeDevice] = []

    def stager_for(blocks: Any, config: Any, pinned_memory: int | None, ring: Any) -> DeviceStager:
        device = FakeDevice(copy_bytes=300)
        devices.append(device)
        plan = [flat.block for flat in blocks]
        needed = pinned.bytes_needed(plan, config.format, config.staleness)
        memory = PinnedMemory(device.driver, needed, pinned_memory)
        return DeviceStager(device, memory, slice_elements=SLICE, ring=ring("cuda-copies"))

    init = Replica.__init__

    def on_gpu(self: Replica, *arguments: Any) -> None:
        init(self, *arguments)
        self.on_gpu = True

    monkeypatch.setattr(joining, "stager_for", stager_for)
    monkeypatch.setattr(Replica, "__init__", on_gpu)
    yield devices
    assert control().fake_violations() == 0
    assert control().fake_unpinned_copies() == 0
    control().fake_reset()


CASES = {
    "one round behind": Case(settings={"staleness": 1}),
    "in step": Case(settings={"staleness": 0}),
    "two rounds behind": Case(settings={"staleness": 2}),
    "one block": Case(blocks=ONE, settings={"staleness": 1}),
    "one block, in step": Case(blocks=ONE, settings={"staleness": 0}),
    "two blocks, bf16": Case(blocks=TWO, dtype=torch.bfloat16, settings={"staleness": 1}),
    "one block, fp16": Case(blocks=ONE, dtype=torch.float16, settings={"staleness": 2}),
    "the reference in between": Case(blocks=TWO, settings={"staleness": 1, "local_view": "reference"}),
}


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_run_on_late_gpus_is_bit_equal_to_the_simulation(
    case: Case, format: str, on_a_late_gpu: list[FakeDevice]
) -> None:
    result = case.run(format=format)
    assert_equal(result, case.simulate(format=format))
    assert len(on_a_late_gpu) == case.clients
    rounds = case.settings.get("rounds", 10)
    assert all(device.launches > rounds for device in on_a_late_gpu)  # more than one slice a block
    assert fake_device.calls("cuLaunchHostFunc") > case.clients * rounds * 2  # watermarks and arrivals


def test_training_that_leaves_a_nan_is_undone_before_the_next_round(on_a_late_gpu: list[FakeDevice]) -> None:
    def spoil(run: Any, step: int) -> None:
        if run.client == 0 and step == 2:
            with torch.no_grad():
                run.block_parameters()[0].fill_(math.nan)

    case = Case(blocks=TWO, clients=2, settings={"staleness": 1})
    result = case.run(format="int8", before_step=spoil)
    assert result.outcome.digest == result.by_seat(0).digest == result.by_seat(1).digest
    for parameter in result.model.parameters():
        assert torch.isfinite(parameter).all()
    seat = result.by_seat(0).run
    assert seat is not None
    assert seat.bad_groups > 0


def test_diverged_bits_end_the_run_one_round_later(
    on_a_late_gpu: list[FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Replica.apply

    def apply_and_flip(self: Replica, round: int, block: int, body: torch.Tensor, expected: int) -> None:
        apply(self, round, block, body, expected + (round == 3))

    monkeypatch.setattr(Replica, "apply", apply_and_flip)
    positional = (mlp, regression(), squared_error, sgd)
    with pytest.raises(DigestError, match=r"after round 3 block 0 .* the copies have diverged"):
        run_federation(*positional, plan_blocks=[["0"], ["2"], ["4"]], clients=1, rounds=8, local_steps=1)


def test_a_run_that_may_pin_nothing_gives_the_same_bits(
    on_a_late_gpu: list[FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "default_cap", lambda: 0)
    case = Case(blocks=TWO, clients=2, settings={"staleness": 1})
    assert_equal(case.run(format="int8"), case.simulate(format="int8"))
    assert fake_device.calls("cuMemHostRegister_v2") == 0
    assert control().fake_unpinned_copies() > 0
    control().fake_reset()

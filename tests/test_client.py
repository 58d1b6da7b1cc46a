"""What a training loop meets at the edges of `Run` and `Server`: odd arguments, exceptions, models that were moved."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parablock_rt as pb
from parablock_rt.blocks.layout import PlanSpec
from parablock_rt.errors import ConfigError, HandshakeError, ParaBlockError, PlanError, StoppedError
from parablock_rt.server import journal
from parablock_rt.server.members import Member
from parablock_rt.server.outcome import ClosedRound
from parablock_rt.wire import protocol

WIDTH = 32


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(width, width, dtype=dtype) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def serve(model: nn.Module | None = None, **settings: object) -> pb.Server:
    return pb.serve(model or Net(), **({"rounds": 6, "clients": 1, "local_steps": 1, "staleness": 1} | settings))


def one_step(run: pb.Run, **options: object) -> pb.StepReport:
    loss = run.model(torch.ones(2, WIDTH, dtype=next(run.model.parameters()).dtype)).square().sum()
    loss.backward()
    return run.step(loss=loss, **options)


def to_the_end(run: pb.Run) -> None:
    while not run.finished:
        one_step(run)


def test_an_optimizer_in_place_of_the_function_that_makes_one_is_refused_before_any_connection() -> None:
    made = torch.optim.SGD(Net().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"expected optimizer to be a function, found a SGD; each round "):
        pb.join("127.0.0.1:1", Net(), made)  # type: ignore[arg-type]


def stream_all(run: pb.Run, loader: Iterable[Tensor], *, step: bool) -> None:
    for batch in run.stream(loader):
        if step:
            run.train_step(batch, lambda model, b: model(b).square().sum())


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("weight", [torch.tensor(5), torch.tensor([2.5]), 3])
def test_a_weight_may_be_a_number_or_a_tensor_of_one(weight: Tensor | int) -> None:
    with serve() as server, pb.join(server.address, Net(), sgd) as run:
        while not run.finished:
            one_step(run, weight=weight)
        assert {closed.weight for closed in server.wait(20).rounds} == {float(weight)}


@pytest.mark.parametrize("weight", [0, -1.0, 1e-30, float("nan"), float("inf"), torch.tensor(0)])
def test_a_weight_that_nothing_can_be_multiplied_by_is_refused_before_the_step(weight: Tensor | float) -> None:
    with serve() as server, pb.join(server.address, Net(), sgd) as run:
        before = [parameter.detach().clone() for parameter in run.block_parameters()]
        with pytest.raises(ConfigError, match=r"expected a weight from 2\^-64 to 2\^64, .*, found"):
            one_step(run, weight=weight)
        assert all(torch.equal(now, old) for now, old in zip(run.block_parameters(), before, strict=True))


@pytest.mark.parametrize("wrong", [{"weight": torch.ones(2)}, {"loss": torch.ones(3)}])
def test_a_weight_or_loss_of_several_elements_is_an_error_that_says_so(wrong: dict[str, Any]) -> None:
    with serve() as server, pb.join(server.address, Net(), sgd) as run:
        run.model(torch.ones(2, WIDTH)).sum().backward()
        with pytest.raises(ConfigError, match=r"one element each, found a tensor of shape \([23],\)"):
            run.step(**wrong)


def test_an_iterator_that_ends_before_the_run_is_named_as_such() -> None:
    def once() -> Iterator[Tensor]:
        yield from torch.ones(2, 2, WIDTH)

    with serve() as server, pb.join(server.address, Net(), sgd) as run:
        generator = once()
        with pytest.raises(ConfigError, match="no batch after 2: it is empty, or it can be iterated only once"):
            stream_all(run, generator, step=True)


def test_gradients_of_several_batches_make_one_step_and_count_as_one() -> None:
    """Two epochs of three batches are three steps of two batches each; the second one spans the epochs."""

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean() / 2

    batches = list(torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(1)))
    with serve(rounds=3) as server, pb.join(server.address, Net(), sgd) as run:
        for seen, batch in enumerate(run.stream(batches, accumulate=2), start=1):
            loss_of(run.model, batch).backward()
            if seen % 2 == 0:
                run.step()
        accumulated = run.digest
    with serve(rounds=3) as server, pb.join(server.address, Net(), sgd) as run:
        for first, second in ((0, 1), (2, 0), (1, 2)):
            (loss_of(run.model, batches[first]) + loss_of(run.model, batches[second])).backward()
            run.step()
        assert run.digest == accumulated is not None


def test_fewer_than_one_batch_a_step_are_refused() -> None:
    with serve() as server, pb.join(server.address, Net(), sgd) as run:
        batches = run.stream([torch.ones(2, WIDTH)], accumulate=0)
        with pytest.raises(ConfigError, match="at least 1 batch per step, found 0"):
            next(batches)


def test_batches_without_a_step_are_an_error_when_there_are_ten_times_as_many_as_are_to_be_accumulated() -> None:
    with serve() as server, pb.join(server.address, Net(), sgd) as run:
        batches = run.stream([torch.ones(2, WIDTH)], accumulate=3)
        for _ in range(30):
            next(batches)
        with pytest.raises(ParaBlockError, match=r"30 of run\.stream's batches in a row were used without"):
            next(batches)


def test_a_run_says_which_round_and_block_train_and_a_report_whether_the_round_has_ended() -> None:
    with serve(rounds=3, local_steps=2) as server, pb.join(server.address, Net(), sgd) as run:
        seen = []
        while not run.finished:
            now = run.round, run.block
            report = one_step(run)
            assert (report.round, report.block) == now
            seen.append((*now, report.round_ended, report.finished))
        assert (run.round, run.block) == (None, None)
    ends = [(False, False), (True, False)] * 2 + [(False, False), (True, True)]
    assert seen == [(i // 2, i // 2 % 2, *end) for i, end in enumerate(ends)]


def test_an_optimizer_that_asks_for_the_round_is_told_it() -> None:
    """The learning rate halves each round; the same run with the rates written out ends on the same bits."""
    rates = [0.1, 0.05, 0.025, 0.0125]

    def halving(parameters: list[nn.Parameter], round: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1 / 2**round)

    with serve(rounds=4) as server, pb.join(server.address, Net(), halving) as run:
        to_the_end(run)
        told = run.digest
    given = iter(rates)
    with serve(rounds=4) as server:
        with pb.join(server.address, Net(), lambda parameters: torch.optim.SGD(parameters, lr=next(given))) as run:
            to_the_end(run)
        assert run.digest == told is not None


def test_a_batch_without_a_step_is_an_error_instead_of_an_endless_loop() -> None:
    with serve() as server, pb.join(server.address, Net(), sgd) as run:
        loader = [torch.ones(2, WIDTH)]
        with pytest.raises(ParaBlockError, match=r"10 of run\.stream's batches in a row were used without run"):
            stream_all(run, loader, step=False)


def test_a_model_that_is_cast_during_the_run_is_noticed_at_the_next_round() -> None:
    with serve() as server, pb.join(server.address, Net(), sgd) as run:
        run.model.to(torch.bfloat16)
        with pytest.raises(PlanError, match="has left its block's flat buffer"):
            to_the_end(run)


def test_a_join_that_fails_gives_the_model_back_trainable() -> None:
    def broken(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        raise ValueError("no optimiser today")

    model = Net()
    with serve() as server, pytest.raises(ValueError, match="no optimiser today"):
        pb.join(server.address, model, broken)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_that_is_dropped_at_a_hand_over_leaves_the_encode_thread_its_memory() -> None:
    """The masters of a large 16-bit block go out of scope while the native thread still reads them."""
    width = 2048

    def explode(report: pb.RoundReport) -> None:
        raise RuntimeError("in the callback")

    for _ in range(3):
        with serve(Net(torch.bfloat16, width), rounds=2) as server:
            run = pb.join(server.address, Net(torch.bfloat16, width), sgd, on_round=explode)
            run.model(torch.ones(1, width, dtype=torch.bfloat16)).sum().backward()
            with pytest.raises(RuntimeError, match="in the callback"):
                run.step()
            del run
            gc.collect()


@pytest.mark.parametrize("staleness", [33, 40])
def test_a_client_may_run_further_ahead_than_a_stranger_may_fall_behind(staleness: int) -> None:
    with serve(staleness=staleness, rounds=staleness + 4) as server, pb.join(server.address, Net(), sgd) as run:
        to_the_end(run)
        outcome = server.wait(20)
    assert len(outcome.rounds) == staleness + 4
    assert outcome.client_digests == {0: outcome.digest}


def test_a_server_may_be_closed_from_its_own_callback() -> None:
    servers: list[pb.Server] = []
    waited: list[str] = []

    def enough(closed: ClosedRound) -> None:
        if closed.round == 2:
            with pytest.raises(ParaBlockError, match="cannot wait for itself") as failure:
                servers[0].wait()
            waited.append(str(failure.value))
            servers[0].close("three rounds are enough")

    servers.append(serve(on_round=enough, rounds=50))
    with servers[0], pb.join(servers[0].address, Net(), sgd) as run:
        with pytest.raises(ParaBlockError, match="three rounds are enough"):
            to_the_end(run)
        with pytest.raises(ParaBlockError, match="three rounds are enough"):
            servers[0].wait(20)
    assert waited


def test_clients_hear_that_the_server_failed_when_its_callback_does() -> None:
    def full(closed: ClosedRound) -> None:
        raise OSError(28, "No space left on device")

    with serve(on_round=full) as server, pb.join(server.address, Net(), sgd) as run:
        with pytest.raises(ParaBlockError, match="the server failed with OSError"):
            to_the_end(run)
        with pytest.raises(OSError, match="No space left"):
            server.wait(20)


def test_one_process_can_hold_a_server_and_its_clients() -> None:
    digests: list[str | None] = []

    def take_part(address: str) -> None:
        with pb.join(address, Net(), sgd) as run:
            to_the_end(run)
        digests.append(run.digest)

    with serve(clients=2) as server:
        threads = [threading.Thread(target=take_part, args=(server.address,), daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        outcome = server.wait(30)
        for thread in threads:
            thread.join(30)
    assert digests == [outcome.digest] * 2


# ---- Devices


def test_blocks_where_nothing_can_stage_them_are_refused_with_what_was_found() -> None:
    from parablock_rt import config
    from parablock_rt.staging import device_stager as device_staging

    blocks = pb.BlockPlan.from_model(model := Net()).materialise(model)
    blocks[1].flats[0] = blocks[1].flats[0].to("meta")
    with pytest.raises(ConfigError, match="expected all blocks in host memory or on one CUDA device, found cpu, meta;"):
        device_staging.stager_for(blocks, config.RunConfig(rounds=1, clients=1, local_steps=1), None)


def test_a_server_whose_model_is_elsewhere_says_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    materialise = pb.BlockPlan.materialise

    def elsewhere(self: pb.BlockPlan, model: nn.Module) -> list[object]:
        blocks = materialise(self, model)
        blocks[0].flats[0] = blocks[0].flats[0].to("meta")
        return list(blocks)

    monkeypatch.setattr(pb.BlockPlan, "materialise", elsewhere)
    with pytest.raises(ConfigError, match=r"must be in host memory; found it on meta; .*model\.cpu\(\)"):
        serve()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "nonsense"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(device: str) -> None:
    from parablock_rt.finetune import loop as finetune

    with pytest.raises(ConfigError, match=r"is not on this machine|must be cpu, cuda or cuda:N"):
        finetune.train("127.0.0.1:1", finetune.Workload.for_model("tiny"), device=device)


def test_the_loss_of_a_step_is_read_when_it_is_asked_for() -> None:
    report = pb.StepReport(torch.tensor(2.5, dtype=torch.float64), 0, 0, 0.0, False, False)
    assert report.loss == 2.5


@pytest.mark.parametrize(("last_line", "code"), [("", 0), ("raise RuntimeError('a bug in the loop')", 1)])
def test_a_program_that_ends_without_closing_anything_ends_as_it_would_without_us(last_line: str, code: int) -> None:
    """Threads that come back from native code to an interpreter that is gone would abort the process."""
    program = f"""
import torch
import parablock_rt as pb

def net():
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))

model = net()
server = pb.serve(model, plan=pb.BlockPlan.from_model(model, blocks=2), rounds=9, clients=1)
run = pb.join(server.address, net(), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
{last_line}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "terminate called" not in done.stderr


# ---- The server


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"token": "short"}, "the token must hold at least 16 characters"),
        ({"token": ""}, "the token must hold at least 16 characters"),
        ({"token": b"sixteen characters and more"}, "expected the token to be text, such as token.hex(), found bytes"),
        ({"tls": True}, "expected tls to be parablock_rt.Tls settings, found True"),
        ({"rate": -1.0}, "expected rate to be a number of bytes per second from 0; found -1.0"),
        ({"rate": "50mbit"}, "expected rate to be a number of bytes per second from 0; found '50mbit'"),
        ({"rate": float("nan")}, "expected rate to be a number of bytes per second from 0; found nan"),
        ({"delay": float("inf")}, "expected delay to be a number of seconds from 0 to 60; found inf"),
        ({"idle_timeout": 0}, "expected idle_timeout to be a number of seconds from 0.1; found 0"),
        ({"lanes": 1.5}, "lanes must be from 1 to 4; found 1.5"),
        ({"lanes": "2"}, "lanes must be from 1 to 4; found '2'"),
        ({"upload_budget": "1"}, "expected upload_budget to be a whole number of bytes, found '1'"),
        ({"on_round": 3}, "expected on_round to be a function of the closed round, found 3"),
        ({"plan": 3}, "expected plan to be a BlockPlan, found 3"),
        ({"durable": ""}, "expected durable to be a folder, found an empty path"),
        ({"address": 7070}, "expected an address such as host:7070 or [::1]:7070, found 7070"),
        ({"address": "http://127.0.0.1:0"}, "expected an address such as host:7070"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_argument_that_would_do_harm_later_is_refused_before_anybody_can_join(
    wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as failure:
        serve(**wrong)
    assert told in str(failure.value)


@pytest.mark.parametrize("waits", [False, True])
def test_a_run_that_failed_is_told_by_wait_or_else_by_the_log(waits: bool, caplog: pytest.LogCaptureFixture) -> None:
    def fail(closed: ClosedRound) -> None:
        raise KeyError("of the program")

    with serve(on_round=fail) as server:
        with pb.join(server.address, Net(), sgd) as run, pytest.raises(ParaBlockError, match="failed with KeyError"):
            to_the_end(run)
        while server.running:
            server._ended.wait(1.0)
        if waits:
            with pytest.raises(KeyError):
                server.wait()
    told = [record for record in caplog.records if "the run failed in round" in record.getMessage()]
    assert len(told) == (0 if waits else 1)
    assert waits or (told[0].exc_info is not None and told[0].exc_info[0] is KeyError)


@pytest.mark.parametrize("stopped_by", ["the end of the block", "close", "on_round", "the end of the program"])
def test_a_run_that_its_owner_ends_early_is_no_failure(stopped_by: str, caplog: pytest.LogCaptureFixture) -> None:
    def stop(closed: ClosedRound) -> None:
        if stopped_by == "on_round":
            server.close()

    with serve(on_round=stop) as server:
        if stopped_by == "close":
            server.close()
        elif stopped_by == "on_round":
            with pb.join(server.address, Net(), sgd) as run, pytest.raises(StoppedError, match="closed by its owner"):
                to_the_end(run)
    if stopped_by == "the end of the program":
        server.close_at_exit()
    assert "failed" not in caplog.text
    with pytest.raises(StoppedError, match="the server was stopped: closed by its owner"):
        server.wait()


@pytest.mark.parametrize(
    "numbers",
    [
        {"rate": np.float32(1e9), "delay": np.float64(0), "idle_timeout": np.int64(30), "lanes": np.int8(2)},
        {"rate": math.inf, "idle_timeout": math.inf, "upload_budget": np.int64(2**20)},
        {"deadline": np.int64(30), "join_timeout": np.float32(30), "fraction": np.float64(1), "server_lr": np.int64(1)},
    ],
)
def test_numbers_of_any_kind_are_numbers(numbers: dict[str, Any]) -> None:
    with serve(**numbers) as server, pb.join(server.address, Net(), sgd, lanes=np.int64(1), rate=np.int64(0)) as run:
        to_the_end(run)
        server.wait(60.0)


def test_nobody_waits_for_a_client_that_has_said_that_it_leaves() -> None:
    """The deadline of the first rounds is ten minutes."""
    with serve(clients=2, rounds=3) as server:
        leaving = threading.Thread(target=lambda: join_and_leave(server.address))
        leaving.start()
        with pb.join(server.address, Net(), sgd) as run:
            to_the_end(run)
        leaving.join()
        outcome = server.wait(60.0)
    assert [closed.contributions for closed in outcome.rounds][-1] == 1
    assert outcome.left == [f"client {1 - run.client}: left before the last round"]


def test_a_client_that_has_finished_keeps_its_seat_whoever_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other client has not said goodbye yet: the run goes on."""
    monkeypatch.setattr("parablock_rt.server.roster.SEAT_KEPT_S", 0.0)
    finishing, over = threading.Event(), threading.Event()

    def finish_late(address: str) -> None:
        with pb.join(address, Net(), sgd) as run:
            farewell = run._link.farewell

            def wait_then_say(goodbye: protocol.Goodbye) -> None:
                finishing.set()
                assert over.wait(60.0)
                farewell(goodbye)

            run._link.farewell = wait_then_say  # type: ignore[method-assign]
            to_the_end(run)

    with serve(clients=2, rounds=3) as server:
        late = threading.Thread(target=finish_late, args=(server.address,))
        late.start()
        with pb.join(server.address, Net(), sgd) as run:
            to_the_end(run)
        assert finishing.wait(60.0)
        with pytest.raises(HandshakeError, match="all 2 seats of this run are taken"):
            pb.join(server.address, Net(), sgd, reconnect=0.0)
        over.set()
        late.join()
        outcome = server.wait(60.0)
    assert outcome.left == []
    assert {seat: goodbye.rounds for seat, goodbye in outcome.goodbyes.items()} == {0: 3, 1: 3}


def test_a_server_whose_thread_does_not_start_leaves_neither_its_port_nor_its_model_in_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = Net()
    with serve(model) as server:
        address = server.address
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no more threads")))
        with pytest.raises(RuntimeError, match="no more threads"):
            serve(model, address=address, durable=tmp_path)
    with pb.serve(model, resume=tmp_path) as server, pb.join(address, Net(), sgd) as run:
        assert server.address == address
        to_the_end(run)


def join_and_leave(address: str) -> None:
    with pb.join(address, Net(), sgd) as run:
        one_step(run)


def test_no_secret_of_a_seat_is_shown_with_what_holds_it() -> None:
    secret, config = b"the seat's secret", pb.RunConfig(rounds=1, clients=1)
    welcome = protocol.Welcome(client=1, config=config, plan=PlanSpec(()), mac=b"", secret=secret, epoch=0)
    of_the_journal = journal.Seated(seat=1, secret=secret), journal.SeatState(secret)
    for holder in (Member(1, secret, None, ""), welcome, *of_the_journal):
        assert "secret" not in repr(holder)

"""Folders of runs that never ran: what a server and its clients would have left, with figures chosen by the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parablock_rt.config import RunConfig
from parablock_rt.observe.run_folder import RunFolder
from parablock_rt.observe.timeline import Stage, Timeline
from parablock_rt.server.outcome import ClosedRound, Outcome, Part
from parablock_rt.summary import summarise
from parablock_rt.wire.protocol import Goodbye

MS = 1_000_000
COMPUTE_MS, EXCHANGE_MS = 400, 300  # of a round with four local steps


def closed_round(index: int, *, exposed_s: float = 0.0, late_s: float = 0.01) -> ClosedRound:
    return ClosedRound(
        round=index,
        block=index % 3,
        loss=3.0 / (index + 1),
        contributions=2,
        weight=2.0,
        bad_groups=0,
        compute_s=COMPUTE_MS / 1e3,
        exposed_s=exposed_s,
        open_s=COMPUTE_MS / 1e3 + exposed_s,
        skew_s=late_s,
        bytes_up=2000 * (index + 1),
        bytes_down=1000 * (index + 1),
        fingerprint=index,
        parts=(Part(0, 0.39, exposed_s, 0.0), Part(1, 0.41, exposed_s, late_s)),
    )


class Process:
    """A process's timeline, written as its own threads would have."""

    def __init__(self, name: str, thread: str) -> None:
        self.timeline = Timeline(name, thread)
        self._rings = {thread: self.timeline.ring(thread, 2**14) for thread in ("pb-encode", "pb-transport")}

    def add(self, stage: Stage, round: int, start_ns: int, end_ns: int, *, chunk: int = 0, peer: int = 1) -> None:
        thread = "pb-encode" if stage == Stage.ENCODE else "pb-transport"
        ring = self._rings[thread]
        assert ring is not None
        ring.write(stage, start_ns, end_ns, 0, round, round % 3, chunk, peer, 1000)


def timelines(rounds: int, chunks: int = 1) -> tuple[Timeline, list[Timeline]]:
    """The server's and two clients'. Each round computes for COMPUTE_MS; 150 ms up and 150 ms down follow."""
    server, clients = Process("server", "pb-server"), [Process(f"client {seat}", "training") for seat in range(2)]
    server.timeline.seats = {1: 0, 2: 1}
    for seat, client in enumerate(clients):
        client.timeline.seat = seat
    for index in range(rounds):
        start = index * COMPUTE_MS * MS
        handed_over = start + COMPUTE_MS * MS
        for seat, client in enumerate(clients):
            client.timeline.add(Stage.COMPUTE, start, handed_over, round=index)
            client.add(Stage.ENCODE, index, handed_over, handed_over + 10 * MS)
            for chunk in range(chunks):
                begin = handed_over + 150 * MS * chunk // chunks
                end = handed_over + 150 * MS * (chunk + 1) // chunks
                client.add(Stage.SEND, index, begin, end, chunk=chunk)
            client.add(Stage.RECEIVE, index, handed_over + 150 * MS, handed_over + EXCHANGE_MS * MS)
            server.add(Stage.RECEIVE, index, handed_over + 20 * MS, handed_over + 150 * MS, peer=seat + 1)
        server.timeline.add(Stage.CLOSE, handed_over + 150 * MS, handed_over + 151 * MS, round=index)
        for process in (server, *clients):
            process.timeline.drain()  # as at a round's end: a ring holds a round
    return server.timeline, [client.timeline for client in clients]


def write_run(path: Path, *, rounds: int = 6, staleness: int = 1, chunks: int = 1, **changes: Any) -> dict[str, Any]:
    """A whole and healthy run; returns its summary. `changes`: what the summary says otherwise."""
    folder = RunFolder(path)
    exposed = EXCHANGE_MS / 1e3 if staleness == 0 else 0.01
    closed = [closed_round(index, exposed_s=exposed) for index in range(rounds)]
    for each in closed:
        names = each.__dataclass_fields__.keys() - {"stages", "server_stages"}  # those of the trace are shown instead
        record = {name: getattr(each, name) for name in names}
        folder.append_metrics(record | {"parts": [vars(part) for part in each.parts]})
    goodbye = Goodbye(digest="d", reason="", compute_s=rounds * COMPUTE_MS / 1e3, exposed_s=rounds * exposed)
    outcome = Outcome(rounds=closed, wall_s=rounds * COMPUTE_MS / 1e3, digest="d", goodbyes={0: goodbye, 1: goodbye})
    config = RunConfig(rounds=rounds, clients=2, local_steps=4, staleness=staleness)
    summary = summarise(
        config,
        outcome,
        blocks=3,
        serial_comm_s=rounds * EXCHANGE_MS / 1e3,
        eval_loss_before=2.5,
        eval_loss_after=1.25,
    )
    folder.write_json("summary.json", summary | changes)
    server, clients = timelines(rounds, chunks)
    folder.write_trace(server)
    for seat, client in enumerate(clients):
        RunFolder(path / f"client-{seat}").write_trace(client)
    return summary | changes

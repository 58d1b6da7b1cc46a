"""torch.distributed send and recv over gloo."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from measuring import End, exchange


class GlooEnd(End):
    """One end; the one that listens is rank 0."""

    def listen(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
        return str(self._port)

    def accept(self) -> None:
        self._join(0)

    def connect(self, where: str) -> None:
        self._port = int(where)
        self._join(1)

    def _join(self, rank: int) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{self._port}", world_size=2, rank=rank)
        self._other = 1 - rank

    def allocate(self, nbytes: int) -> Any:
        return torch.zeros(nbytes, dtype=torch.uint8).numpy()

    def send(self, memory: Any) -> None:
        dist.send(torch.from_numpy(memory), self._other)

    def receive(self, memory: Any) -> None:
        dist.recv(torch.from_numpy(memory), self._other)

    def close(self) -> None:
        dist.destroy_process_group()


if __name__ == "__main__":
    exchange(GlooEnd)

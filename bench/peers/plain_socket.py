"""A blocking Python socket: sendall and recv_into."""

from __future__ import annotations

import socket
from typing import Any

from measuring import End, exchange


class SocketEnd(End):
    """One end."""

    def listen(self) -> str:
        self._listener = socket.create_server(("127.0.0.1", 0))
        return str(self._listener.getsockname()[1])

    def accept(self) -> None:
        self._socket, _ = self._listener.accept()
        self._set_up()

    def connect(self, where: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", int(where)))
        self._set_up()

    def _set_up(self) -> None:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def allocate(self, nbytes: int) -> Any:
        return bytearray(nbytes)

    def send(self, memory: Any) -> None:
        self._socket.sendall(memory)

    def receive(self, memory: Any) -> None:
        view, at = memoryview(memory), 0
        while at < len(view):
            count = self._socket.recv_into(view[at:])
            if count == 0:
                raise RuntimeError("the other end closed the connection")
            at += count

    def close(self) -> None:
        self._socket.close()


if __name__ == "__main__":
    exchange(SocketEnd)

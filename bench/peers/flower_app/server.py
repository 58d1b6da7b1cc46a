"""Flower's side of a transfer: the ServerApp sends the payload as an ArrayRecord and waits for the reply."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Sends a small message first, then the payload; writes what came of it as JSON."""
    settings = context.run_config
    sys.path.insert(0, str(settings["helpers"]))
    import measuring

    legs, nbytes = int(settings["legs"]), int(settings["nbytes"])
    while not list(grid.get_node_ids()):
        time.sleep(0.1)
    (node,) = grid.get_node_ids()

    def exchange(array: np.ndarray) -> tuple[float, RecordDict]:
        content = RecordDict({"arrays": ArrayRecord([array]), "settings": ConfigRecord({"legs": legs})})
        start = time.monotonic()
        (reply,) = grid.send_and_receive([Message(content=content, message_type="query", dst_node_id=node)])
        return time.monotonic() - start, reply.content

    _, content = exchange(np.zeros(1024, np.uint8))
    client_base = content["report"]["memory"]
    memory = [measuring.Memory(), measuring.Memory(int(settings["superlink"]))]
    client_memory = measuring.Memory(int(settings["supernode"]))
    payload = np.frombuffer(measuring.payload(nbytes), np.uint8)
    seconds, content = exchange(payload)
    there = content["report"]["digest"] == measuring.digest(payload)
    back = legs == 1 or measuring.digest(content["arrays"].to_numpy_ndarrays()[0]) == measuring.digest(payload)
    result = {
        "seconds": seconds,
        "moved": bool(there and back),
        "server_bytes": sum(part.peak_beyond_base() for part in memory),
        "client_bytes": content["report"]["memory"] - client_base + client_memory.peak_beyond_base(),
    }
    written = Path(str(settings["result"]))
    written.with_suffix(".part").write_text(json.dumps(result))
    written.with_suffix(".part").rename(written)

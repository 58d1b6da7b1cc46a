"""Flower's side of a transfer: the ClientApp takes the payload and, for two legs, sends it back."""

from __future__ import annotations

import sys

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Replies with the digest of what came, and with the payload itself where it is asked for."""
    sys.path.insert(0, str(context.run_config["helpers"]))
    import measuring

    (payload,) = message.content["arrays"].to_numpy_ndarrays()
    content = RecordDict()
    if message.content["settings"]["legs"] == 2:
        content["arrays"] = ArrayRecord([payload])
    report = {"digest": measuring.digest(payload), "memory": measuring.memory_bytes("VmHWM")}
    content["report"] = ConfigRecord(report)
    return Message(content=content, reply_to=message)

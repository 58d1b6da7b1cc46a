"""Which models are in use: a server or a client moves and writes a model's parameters, so it must be the only user."""

from __future__ import annotations

import threading
import weakref

from torch import nn

from parablock_rt.errors import ConfigError

_lock = threading.Lock()
_claims: weakref.WeakValueDictionary[int, Claim] = weakref.WeakValueDictionary()  # by the model's id


class Claim:
    """Marks a model as in use until the claim is released or garbage-collected. Any thread."""

    def __init__(self, model: nn.Module, user: str) -> None:
        """`user`: "server" or "client". Raises ConfigError when the model is already claimed."""
        self._user = user
        self._model = model  # keeps the id from being reused
        with _lock:
            if (other := _claims.get(id(model))) is not None:
                raise ConfigError(
                    f"this model is in use by a {other._user} that was not closed: give every join and serve a model "
                    "of its own, such as copy.deepcopy(model)"
                )
            _claims[id(model)] = self

    def release(self) -> None:
        """Ends the claim. Idempotent."""
        with _lock:
            if _claims.get(id(self._model)) is self:
                del _claims[id(self._model)]

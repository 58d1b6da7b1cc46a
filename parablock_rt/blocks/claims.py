"""Which models are in use: a server or a client moves a model's parameters and writes them, so it alone may have it."""

from __future__ import annotations

import threading
import weakref

from torch import nn

from parablock_rt.errors import ConfigError

_lock = threading.Lock()
_claims: weakref.WeakValueDictionary[int, Claim] = weakref.WeakValueDictionary()  # by the model's id


class Claim:
    """A model is in use, until this is released or gone. Any thread."""

    def __init__(self, model: nn.Module, user: str) -> None:
        """`user`: a server or a client. Raises ConfigError when somebody else has claimed the model."""
        self._user = user
        self._model = model  # so that nothing else gets its id
        with _lock:
            if (other := _claims.get(id(model))) is not None:
                raise ConfigError(
                    f"this model is in use by a {other._user} that was not closed: give every join and serve a model "
                    "of its own, such as copy.deepcopy(model)"
                )
            _claims[id(model)] = self

    def release(self) -> None:
        """The model is not in use any more. Idempotent."""
        with _lock:
            if _claims.get(id(self._model)) is self:
                del _claims[id(self._model)]

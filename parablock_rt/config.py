"""The settings of a run. The server owns them and sends them to every client; a client chooses none of them.

Only plain data and its validation: no defaults that depend on the machine, no networking.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from parablock_rt.codec import MAX_CONTRIBUTIONS, check_format
from parablock_rt.errors import ConfigError

Order = Literal["cyclic", "reshuffled", "reverse"]
LocalView = Literal["own", "reference"]
ServerOptimizer = Literal["average", "momentum", "adam", "yogi"]

MAX_CLIENTS = MAX_CONTRIBUTIONS
"""The most contributions that the fixed-point sum of one round can take without overflow."""

MAX_ROUNDS = 2**31  # a frame has 32 bits for the round
MAX_STALENESS = 64  # a client keeps room for an aggregate of each round that it may be ahead
MAX_CHUNK = 2**24  # elements


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings that server and clients must agree on, and the server's rules for closing a round.

    Construction raises ConfigError for an invalid value.
    """

    rounds: int
    clients: int
    local_steps: int = 4
    staleness: int = 1
    format: str = "int8"
    schedule: str = "cyclic"
    seed: int = 0
    local_view: str = "own"
    fraction: float = 1.0  # of the clients that train in a round
    quorum: int | None = None  # clients; None: half of the cohort, rounded up
    deadline: float | None = None  # seconds for the oldest open round; None: adapts to the speed seen
    join_timeout: float = 600.0  # seconds to wait for all clients before the first round
    server_optimizer: str = "average"
    server_lr: float = 1.0
    chunk: int = 2**18  # elements

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("rounds", "clients", "local_steps"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("rounds", "local_steps"):
            _require(getattr(self, name) <= MAX_ROUNDS, name, f"at most {MAX_ROUNDS}", getattr(self, name))
        _require(self.clients <= MAX_CLIENTS, "clients", f"at most {MAX_CLIENTS}", self.clients)
        _require(0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1", self.seed)
        _require(
            0 <= self.staleness <= MAX_STALENESS,
            "staleness",
            f"0 (no overlap), 1 (ParaBlock) or more, at most {MAX_STALENESS}",
            self.staleness,
        )
        check_format(self.format)
        for name, kind in (("schedule", Order), ("local_view", LocalView), ("server_optimizer", ServerOptimizer)):
            _require(
                getattr(self, name) in get_args(kind), name, f"one of {', '.join(get_args(kind))}", getattr(self, name)
            )
        _require(0 < self.fraction <= 1, "fraction", "above 0 and at most 1", self.fraction)
        _require(
            self.quorum is None or 1 <= self.quorum <= self.cohort_size,
            "quorum",
            f"from 1 to the number of clients that train in a round ({self.cohort_size})",
            self.quorum,
        )
        for name in ("deadline", "join_timeout", "server_lr"):
            value = getattr(self, name)
            _require(value is None or (value > 0 and math.isfinite(value)), name, "a positive number", value)
        _require(
            128 <= self.chunk <= MAX_CHUNK and self.chunk % 128 == 0,
            "chunk",
            f"a multiple of 128 elements from 128 to {MAX_CHUNK}",
            self.chunk,
        )

    def _check_types(self) -> None:
        """Checks the types; msgspec checks them only when it decodes a struct, not on construction. NumPy's numbers
        become Python's."""
        for name in self.__struct_fields__:
            if isinstance(value := getattr(self, name), np.generic):
                msgspec.structs.force_setattr(self, name, value.item())
        for name in ("rounds", "clients", "local_steps", "staleness", "seed", "quorum", "chunk"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole or (name == "quorum" and value is None), name, "a whole number", value)
        for name in ("fraction", "deadline", "join_timeout", "server_lr"):
            value = getattr(self, name)
            _require(isinstance(value, (int, float)) or (name == "deadline" and value is None), name, "a number", value)

    @property
    def cohort_size(self) -> int:
        """Clients that train in each round."""
        return max(1, round(self.fraction * self.clients))

    @property
    def quorum_size(self) -> int:
        """The fewest contributions with which a round can be closed at its deadline."""
        return self.quorum if self.quorum is not None else self.cohort_size // 2 + self.cohort_size % 2


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"expected {name} to be {expected}, found {found!r}")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port", "[::1]:port" or ":port" (all interfaces). Raises ConfigError."""
    host, separator, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not separator or "/" in host or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise ConfigError(f"expected an address such as host:7070 or [::1]:7070, found {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, by the names of the command line's flags with "_" for "-".

    Raises ConfigError when the file cannot be read or is not valid TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text()).items()}
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error

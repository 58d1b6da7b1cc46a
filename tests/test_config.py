"""The settings of a run: what is refused, with which words, and how rates, delays, addresses and files are read."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parablock_rt as pb
from parablock_rt import config
from parablock_rt.config import RunConfig, parse_address, read_toml
from parablock_rt.errors import ConfigError, HandshakeError
from parablock_rt.finetune import loop as finetune
from parablock_rt.finetune.loop import Workload
from parablock_rt.wire import protocol

GOOD: dict[str, Any] = {"rounds": 4, "clients": 2}

BAD_SETTINGS: list[tuple[str, Any, str]] = [
    ("rounds", 0, "expected rounds to be at least 1, found 0"),
    ("rounds", -3, "expected rounds to be at least 1, found -3"),
    ("rounds", 2.5, "expected rounds to be a whole number, found 2.5"),
    ("rounds", "4", "expected rounds to be a whole number, found '4'"),
    ("rounds", True, "expected rounds to be a whole number, found True"),
    ("rounds", 2**32, f"expected rounds to be at most {2**31}, found {2**32}"),
    ("clients", 0, "expected clients to be at least 1, found 0"),
    ("clients", config.MAX_CLIENTS + 1, f"expected clients to be at most {config.MAX_CLIENTS}, found"),
    ("local_steps", 0, "expected local_steps to be at least 1, found 0"),
    ("local_steps", 2**62, f"expected local_steps to be at most {2**31}, found {2**62}"),
    ("staleness", -1, "expected staleness to be 0 (no overlap), 1 (ParaBlock) or more, at most 64, found -1"),
    ("staleness", 65, "1 (ParaBlock) or more, at most 64, found 65"),
    ("format", "int2", "expected a format out of fp32, bf16, int8, int4, found 'int2'"),
    ("schedule", "random", "expected schedule to be one of cyclic, reshuffled, reverse, found 'random'"),
    ("seed", -1, "expected seed to be from 0 to 2^63 - 1, found -1"),
    ("seed", 2**63, f"expected seed to be from 0 to 2^63 - 1, found {2**63}"),
    ("local_view", "mine", "expected local_view to be one of own, reference, found 'mine'"),
    ("fraction", 0.0, "expected fraction to be above 0 and at most 1, found 0.0"),
    ("fraction", 1.5, "expected fraction to be above 0 and at most 1, found 1.5"),
    ("fraction", math.nan, "expected fraction to be above 0 and at most 1, found nan"),
    ("fraction", "all", "expected fraction to be a number, found 'all'"),
    ("quorum", 0, "expected quorum to be from 1 to the number of clients that train in a round (2), found 0"),
    ("quorum", 3, "expected quorum to be from 1 to the number of clients that train in a round (2), found 3"),
    ("deadline", 0.0, "expected deadline to be a positive number, found 0.0"),
    ("deadline", math.inf, "expected deadline to be a positive number, found inf"),
    ("join_timeout", -1.0, "expected join_timeout to be a positive number, found -1.0"),
    ("join_timeout", None, "expected join_timeout to be a number, found None"),
    ("server_optimizer", "sgd", "expected server_optimizer to be one of average, momentum, adam, yogi, found 'sgd'"),
    ("server_lr", math.nan, "expected server_lr to be a positive number, found nan"),
    ("chunk", 100, f"expected chunk to be a multiple of 128 elements from 128 to {2**24}, found 100"),
    ("chunk", 2**25, f"expected chunk to be a multiple of 128 elements from 128 to {2**24}, found {2**25}"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_SETTINGS, ids=[f"{n}={v}" for n, v, _ in BAD_SETTINGS])
def test_a_setting_that_no_run_can_use_is_refused_with_what_was_expected(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as failure:
        RunConfig(**GOOD | {name: value})
    assert message in str(failure.value)


@pytest.mark.parametrize("name", ["rounds", "schedule", "format", "chunk"])
def test_a_server_looks_at_the_settings_before_it_touches_the_model(name: str) -> None:
    class Untouchable(nn.Module):
        def named_parameters(self, *args: Any, **options: Any) -> Any:
            raise AssertionError("the model was touched")

    bad = next(value for setting, value, _ in BAD_SETTINGS if setting == name)
    with pytest.raises(ConfigError):
        pb.serve(Untouchable(), **GOOD | {name: bad})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rounds": 1, "clients": 1, "round": 3},
            "serve has no setting round; the settings of a run are chunk, clients, ",
        ),
        ({"rounds": 1}, "a run needs to know clients; give clients=..."),
        ({}, "a run needs to know clients and rounds; give clients=..., rounds=..."),
        (
            {"config": RunConfig(**GOOD), "rounds": 3},
            "give a config, or its fields as keywords; found both, with rounds",
        ),
    ],
)
def test_settings_that_are_misspelt_missing_or_given_twice_are_refused_by_name(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        pb.serve(nn.Linear(2, 2), **settings)


def test_a_server_takes_a_config_as_it_is() -> None:
    config = RunConfig(rounds=3, clients=2, format="int4")
    model = nn.Linear(64, 64)
    with pb.serve(model, config, plan=pb.BlockPlan.from_model(model, blocks=1)) as server:
        assert server.config is config


def test_a_quorum_may_not_exceed_the_part_of_the_clients_that_trains() -> None:
    assert RunConfig(rounds=1, clients=8, fraction=0.5, quorum=4).quorum_size == 4
    with pytest.raises(ConfigError, match=r"that train in a round \(4\), found 5"):
        RunConfig(rounds=1, clients=8, fraction=0.5, quorum=5)


@pytest.mark.parametrize(
    ("clients", "fraction", "cohort", "quorum"), [(1, 1.0, 1, 1), (2, 1.0, 2, 1), (3, 1.0, 3, 2), (9, 0.01, 1, 1)]
)
def test_cohort_and_quorum_without_a_word_on_them(clients: int, fraction: float, cohort: int, quorum: int) -> None:
    settings = RunConfig(rounds=1, clients=clients, fraction=fraction)
    assert (settings.cohort_size, settings.quorum_size) == (cohort, quorum)


def test_settings_that_no_run_can_use_are_refused_when_they_come_over_the_wire() -> None:
    plan = pb.BlockPlan.from_model(nn.Linear(4, 4), 1).spec()
    welcome = protocol.Welcome(client=0, config=RunConfig(**GOOD), plan=plan, mac=b"", secret=b"", epoch=0)
    assert protocol.decode(protocol.encode(welcome)) == welcome
    forged = msgspec.msgpack.decode(protocol.encode(welcome))
    forged["config"]["rounds"] = 0
    with pytest.raises(HandshakeError, match="expected rounds to be at least 1, found 0"):
        protocol.decode(msgspec.msgpack.encode(forged))
    forged["config"] |= {"rounds": 1, "surprise": 1}
    with pytest.raises(HandshakeError, match="unknown field `surprise`"):
        protocol.decode(msgspec.msgpack.encode(forged))


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; found 0"),
        ({"seq_len": 0}, "seq_len must be at least 1; found 0"),
        ({"threads": 0}, "threads must be at least 1; found 0"),
        ({"eval_examples": -1}, "eval_examples must not be negative; found -1"),
        ({"lr": math.nan}, "lr must be positive; found nan"),
        ({"dtype": "int8"}, "dtype must be one of bf16, fp16, fp32; found 'int8'"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as failure:
        Workload.for_model("tiny", **given_settings)
    assert message in str(failure.value)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as failure:
        finetune.load(Workload.for_model(str(tmp_path / "nothing"), task="additions"))
    assert str(tmp_path / "nothing") in str(failure.value)


# ---- Rates, delays, addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host:7070", ("host", 7070)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:7070", ("::1", 7070)),
        (":7070", ("", 7070)),
        ("host:65535", ("host", 65535)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:65536", "host:-1", "host:+1", "h:" + "9" * 5000])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as failure:
        parse_address(text)
    assert str(failure.value) == f"expected an address such as host:7070 or [::1]:7070, found {text!r}"


@given(st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert 0 <= parse_address(text)[1] <= 65535


# ---- Files


def test_a_file_has_the_flags_as_keys(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('local-steps = 3\nbatch_size = 2\nrate = "1mbit"\n')
    assert read_toml(file) == {"local_steps": 3, "batch_size": 2, "rate": "1mbit"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the configuration"), (b"rounds = ", "is not valid TOML"), (b"\xff\xfe", "is not valid TOML")],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as failure:
        read_toml(file)
    assert message in str(failure.value)
    assert str(file) in str(failure.value)


def test_whole_numbers_of_numpy_are_whole_numbers_also_on_the_wire() -> None:
    config = RunConfig(rounds=np.int64(2), clients=np.int32(3), quorum=np.uint8(2))
    assert config == RunConfig(rounds=2, clients=3, quorum=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=RunConfig) == config
    with pytest.raises(ConfigError, match="expected rounds to be a whole number"):
        RunConfig(rounds=np.float64(2.0), clients=1)

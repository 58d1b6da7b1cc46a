"""Fixtures that more than one test module uses."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="module", params=["avx512-vnni", "avx512", "avx2", "portable"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with every variant of the codec that this machine can run, then restores the choice."""
    from parablock_rt import _C

    before = _C.instruction_set()
    try:
        _C.force_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _C.force_instruction_set(before)


def pytest_configure() -> None:
    # A shell that starts the tests in the background has them ignore Ctrl-C, and every process they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

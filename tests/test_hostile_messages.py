"""Clients that may say anything at any time: the fuzzer's program (`make fuzz`), here with random inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hardening import hostile
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "hardening" / "corpus" / "messages"


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=600))
def test_no_client_can_end_the_run_with_anything_it_says(data: bytes) -> None:
    hostile.one_input(data)


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_the_fuzzer_has_found_stays_fixed(path: Path) -> None:
    hostile.one_input(path.read_bytes())

"""The list of faults in docs/transport.md: complete, and of tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "transport.md"
FAULTS = [
    *("client killed (SIGKILL) in an upload", "client killed in a download", "client killed between rounds"),
    *("server killed", "SIGSTOP", "RST", "half-open connection", "link cut for 30 s in the middle of a block"),
    *("one flipped bit", "truncated frames", "over-long frames", "1-byte writes", "slow reader"),
    *("500 connections that send nothing", "random bytes", "a replayed handshake", "a replayed upload", "wrong token"),
    *("wrong CA", "an expired certificate", "a plan that lies about sizes", "two hundred breaks"),
]


def rows() -> list[tuple[str, list[str]]]:
    """Each fault of the table, and the tests that it names."""
    section = PAGE.read_text().split("\n## Faults\n")[1].split("\n## ")[0]
    cells = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    return [(fault.strip(), re.findall("`([^`]+)`", tests)) for fault, _, tests in cells]


@pytest.mark.parametrize(("fault", "tests"), rows(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_test_that_the_table_names_is_there(fault: str, tests: list[str]) -> None:
    assert tests, fault
    for test in tests:
        file, name = test.split("::")
        found = {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in found, f"{test}, for {fault}"


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_that_was_promised_is_in_the_table(fault: str) -> None:
    assert any(fault in listed for listed, _ in rows())

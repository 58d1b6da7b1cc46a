"""The fuzzer of the Python side: control messages and what the server makes of them, guided by coverage (atheris)."""

from __future__ import annotations

import logging
import sys

import atheris

with atheris.instrument_imports(include=["parablock_rt"]):
    import hostile


def main() -> None:
    logging.getLogger("parablock").setLevel(logging.CRITICAL)  # what is hostile is dismissed with a warning
    atheris.Setup(sys.argv, hostile.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

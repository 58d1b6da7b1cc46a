"""The codec's golden vectors: inputs and the bytes that every implementation must make of them.

`tests/data/codec_golden.safetensors` is written once from the NumPy statement and then only compared with. It is
rewritten by hand alone, when the format itself gets a new version or the server's sum another definition:

    python tests/codec_golden.py --write

Without `--write` the script compares and exits with 1 if the file differs from the statement.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import codec_cases as cases
import codec_statement as statement
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Array = NDArray[Any]

PATH = Path(__file__).parent / "data" / "codec_golden.safetensors"
FORMATS = statement.FORMATS
SCALED = ("int8", "int4")
NUMEL = 3 * 128
# name: dtype of now, dtype of ref, with residual
CASES = {"plain": ("fp32", "fp32", True), "halves": ("bf16", "fp16", False)}
TARGETS = ("fp32", "bf16", "fp16")
WEIGHTS = {"fp32": 0.1, "bf16": 3.0, "int8": 1.0 / 3.0, "int4": 1000.5}


def inputs(case: str) -> dict[str, Array]:
    """now, ref and perhaps residual: an ordinary group, one with a NaN or an infinity, ties with a zero group."""
    now_dtype, ref_dtype, has_residual = CASES[case]
    rng = np.random.default_rng(20 + len(case))
    x = rng.standard_normal(NUMEL).astype(np.float32) * np.float32(1e-3)
    x[128 + 64 + 7] = np.nan if has_residual else np.inf
    x[256:320] = (rng.integers(-8, 8, 64) + np.float32(0.5)) * np.float32(2.0**-9)
    x[257] = -8 * 2.0**-9
    x[320:] = 0
    ref = rng.standard_normal(NUMEL).astype(np.float32) * np.float32(0.02)
    ref[256:] = 0
    made = {
        "now": statement.narrow(ref + x, cases.NUMPY[now_dtype]),
        "ref": statement.narrow(ref, cases.NUMPY[ref_dtype]),
    }
    if has_residual:
        made["residual"] = (rng.standard_normal(NUMEL) * 1e-5).astype(np.float32)
        made["residual"][256:] = 0
    return made


def target(dtype: str) -> Array:
    """What the golden bodies are applied to: weights, and a NaN with a payload that must not survive."""
    weights = (np.random.default_rng(3).standard_normal(NUMEL) * 0.02).astype(np.float32)
    weights[9] = statement.floats(np.array([0xFFC12345], dtype=np.uint32))[0]
    return statement.narrow(weights, cases.NUMPY[dtype])


def outputs(case: str, given: dict[str, Array]) -> dict[str, Array]:
    """By the statement: a body, a residual and a count a format, what apply makes of it, and a weighted sum."""
    made: dict[str, Array] = {}
    total = statement.Accumulator(NUMEL)
    for format in FORMATS:
        body, left, bad = statement.encode(given["now"], given["ref"], given.get("residual"), format)
        made[f"{format}.body"] = np.frombuffer(body, dtype=np.uint8)
        made[f"{format}.residual"] = left
        made[f"{format}.bad"] = np.array([bad], dtype=np.int64)
        total.add(body, WEIGHTS[format], format)
        if case == "plain" and format in SCALED:
            for dtype in TARGETS:
                made[f"{format}.applied.{dtype}"] = _canonical(statement.apply(target(dtype), body, format))
    if case == "plain":
        made["sum.hi"] = np.array(total.hi, dtype=np.int64)
        made["sum.lo"] = np.array(total.lo, dtype=np.int64)
    return made


def _canonical(values: Array) -> Array:
    """NaNs as apply stores them: quiet, positive, no payload."""
    bits = values.view({4: np.uint32, 2: np.uint16}[values.itemsize]).copy()
    quiet = {"float32": 0x7FC00000, "uint16": 0x7FC0, "float16": 0x7E00}[values.dtype.name]
    bits[np.isnan(statement.widen(values))] = quiet
    return bits.view(values.dtype)


def make() -> dict[str, Array]:
    """All vectors anew, from the statement."""
    made: dict[str, Array] = {}
    for case in CASES:
        given = inputs(case)
        made |= {f"{case}.{name}": value for name, value in (given | outputs(case, given)).items()}
    return made


def load() -> dict[str, Array]:
    """The vectors as they are in the repository."""
    vectors: dict[str, Array] = load_file(PATH)
    return vectors


def differences(found: dict[str, Array], expected: dict[str, Array]) -> list[str]:
    """Names of the vectors that are missing, new, or not the same bytes."""
    return sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found
        or name not in expected
        or found[name].dtype != expected[name].dtype
        or found[name].tobytes() != expected[name].tobytes()
    )


if __name__ == "__main__":
    if "--write" in sys.argv:
        PATH.parent.mkdir(exist_ok=True)
        save_file(make(), PATH)
        print(f"wrote {PATH}, {PATH.stat().st_size} bytes")
    else:
        wrong = differences(load(), make())
        print("the same" if not wrong else f"different: {', '.join(wrong)}")
        sys.exit(bool(wrong))

"""The golden vectors: the statement and the native codec make the bytes that are in the repository.

The kernels are held against the same file where they can run (`kernel_checks`).
"""

from __future__ import annotations

import codec_golden as golden
import numpy as np
import pytest
import torch
from codec_cases import to_numpy, to_torch

from parablock_rt import codec


def test_the_statement_reproduces_every_vector() -> None:
    assert golden.differences(golden.make(), golden.load()) == []


def test_one_changed_byte_is_noticed() -> None:
    changed = golden.load()
    changed["plain.int8.body"] = changed["plain.int8.body"].copy()
    changed["plain.int8.body"][-1] ^= 1
    assert golden.differences(changed, golden.load()) == ["plain.int8.body"]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("case", golden.CASES)
def test_the_native_codec_reproduces_every_vector(case: str) -> None:
    vectors = {name.removeprefix(f"{case}."): v for name, v in golden.load().items() if name.startswith(f"{case}.")}
    given = {name: vectors[name] for name in ("now", "ref", "residual") if name in vectors}
    made = dict(given)
    total = codec.Accumulator(golden.NUMEL)
    for format in golden.FORMATS:
        left = torch.full((golden.NUMEL,), np.nan)
        residual = to_torch(given["residual"]) if "residual" in given else None
        packed = codec.encode(
            to_torch(given["now"]), to_torch(given["ref"]), residual, format=format, residual_out=left
        )
        made[f"{format}.body"] = to_numpy(packed.body)
        made[f"{format}.residual"] = to_numpy(left)
        made[f"{format}.bad"] = np.array([packed.bad_groups])
        total.add(packed.body, golden.WEIGHTS[format], format)
        if case == "plain" and format in golden.SCALED:
            for dtype in golden.TARGETS:
                target = to_torch(golden.target(dtype))
                codec.apply_(target, packed.body, format=format)
                made[f"{format}.applied.{dtype}"] = to_numpy(target)
    if case == "plain":
        made["sum.hi"], made["sum.lo"] = (half.numpy() for half in total._halves)
    assert golden.differences(made, vectors) == []

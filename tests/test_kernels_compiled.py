"""The kernels compiled for GPUs that are not here: what the machine code promises, and what it must not contain.

Every byte of weights, residuals, codes and sums moves once, in accesses of 16 bytes; nothing spills; no operation is
fused, approximate or flushes denormals. That the arithmetic is right is the business of the interpreter and GPU tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.3", reason="triton 3.3 or newer is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from parablock_rt import kernels  # noqa: E402

common = kernels.common

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
POINTER = {"fp32": "*i32", "bf16": "*i16", "fp16": "*i16"}
CODE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}
SCALED = ("int8", "int4")
DIVISION = re.compile(r"\bdiv\.rn(?:\.ftz)?\.f32\b")  # triton before 3.6 makes it flush subnormals: see the test below
MAX_REGISTERS = 128  # four blocks of four warps fit on one multiprocessor


@dataclass(frozen=True)
class Program:
    """One specialisation of one kernel, and the bytes per element it may read and write in 16-byte accesses."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    read: float
    written: float
    narrow: frozenset[int] = field(default_factory=frozenset)  # other widths, in bytes, that it may have

    def compile(self, arch: int, misaligned: tuple[str, ...] = ()) -> Any:
        names = self.kernel.arg_names
        signature = {name: self.signature.get(name, "constexpr") for name in names}
        source = ASTSource(
            self.kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(names)
                if signature[name].startswith("*") and name not in misaligned
            },
        )
        options = {"num_warps": self.warps, **common.OPTIONS}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def planes(format: str, word_bytes: int = 4) -> tuple[dict[str, str], dict[str, Any]]:
    if format in SCALED:
        signature = {"scales_ptr": "*i16", "codes_ptr": f"*i{8 * word_bytes}", "groups": "i32"}
        return signature, {"FORMAT": format, "WORD": int(word_bytes / CODE_BYTES[format])}
    return {"codes_ptr": POINTER[format], "groups": "i32"}, {"FORMAT": format, "WORD": 1, "scales_ptr": None}


def encode(format: str, now: str, ref: str, word_bytes: int = 4) -> Program:
    module = import_module("parablock_rt.kernels.encode")
    signature, constants = planes(format, word_bytes)
    signature |= {"now_ptr": POINTER[now], "ref_ptr": POINTER[ref], "residual_ptr": "*fp32", "kept_ptr": "*fp32"}
    constants |= {"NOW": now, "REF": ref, "TILE": module.TILE}
    kernel = module.encode_groups_kernel
    if format not in SCALED:
        kernel = module.encode_elements_kernel
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature["bad_ptr"] = "*i64"
    read = WIDTH[now] + WIDTH[ref] + 4
    narrow = frozenset({2} if format in SCALED else ())
    return Program(kernel, signature, constants, module.WARPS, read, 4 + CODE_BYTES[format], narrow)


def encode_fresh(format: str, dtype: str) -> Program:
    """Without a residual, neither read nor kept."""
    program = encode(format, dtype, dtype)
    absent = ("residual_ptr", "kept_ptr")
    signature = {name: kind for name, kind in program.signature.items() if name not in absent}
    constants = program.constants | dict.fromkeys(absent)
    read, written = program.read - 4, program.written - 4
    return replace(program, signature=signature, constants=constants, read=read, written=written)


def decode(format: str) -> Program:
    module = import_module("parablock_rt.kernels.decode")
    signature, constants = planes(format)
    constants["TILE"] = module.TILE
    narrow = frozenset({2} if format in SCALED else ())
    signature["out_ptr"] = "*fp32"
    return Program(module.decode_kernel, signature, constants, module.WARPS, CODE_BYTES[format], 4, narrow)


def apply(format: str, target: str) -> Program:
    module = import_module("parablock_rt.kernels.apply")
    signature, constants = planes(format)
    signature["target_ptr"] = POINTER[target]
    constants |= {"KIND": target, "TILE": module.TILE}
    size = WIDTH[target]
    narrow = frozenset({2} if format in SCALED else ())
    return Program(module.apply_kernel, signature, constants, module.WARPS, size + CODE_BYTES[format], size, narrow)


def accumulate(format: str) -> Program:
    module = import_module("parablock_rt.kernels.accumulate")
    signature, constants = planes(format)
    signature |= {"hi_ptr": "*i64", "lo_ptr": "*i64", "weight_bits": "i64"}
    constants["TILE"] = module.TILE
    # A thread has 16 elements, whose int4 codes are 8 bytes.
    codes, narrow = (0.0, frozenset({2, 8})) if format == "int4" else (CODE_BYTES[format], frozenset({2}))
    if format not in SCALED:
        narrow = frozenset()
    return Program(module.accumulate_kernel, signature, constants, module.WARPS, 16 + codes, 16, narrow)


PROGRAMS: dict[str, Callable[[], Program]] = {}
for _format in common.FORMATS:
    for _dtype in ("fp32", "bf16"):
        PROGRAMS[f"encode {_format} {_dtype}"] = lambda f=_format, d=_dtype: encode(f, d, d)
        PROGRAMS[f"apply {_format} {_dtype}"] = lambda f=_format, d=_dtype: apply(f, d)
    PROGRAMS[f"decode {_format}"] = lambda f=_format: decode(f)
    PROGRAMS[f"accumulate {_format}"] = lambda f=_format: accumulate(f)
PROGRAMS["encode int8 fp16 fp32"] = lambda: encode("int8", "fp16", "fp32")
PROGRAMS["encode int8 bf16 fresh"] = lambda: encode_fresh("int8", "bf16")
PROGRAMS["apply int8 fp16"] = lambda: apply("int8", "fp16")
ELSEWHERE = ("encode int8 fp32", "encode int8 bf16", "encode int4 bf16", "apply int8 bf16", "accumulate int8")
COMPILED = [(name, 90) for name in PROGRAMS] + [(name, arch) for arch in (80, 100) for name in ELSEWHERE]


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile anew: a cached result would hide that compiling no longer works."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@cache
def compiled(name: str, arch: int) -> Any:
    return PROGRAMS[name]().compile(arch)


def accesses(ptx: str, kind: str) -> Counter[int]:
    """How many global loads ("ld") or stores ("st") there are of each width in bytes."""
    found = re.findall(rf"\b{kind}\.global(?:\.[a-z_]\w*(?:::\w+)?)*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)


def assemble(ptx: str, folder: Path) -> tuple[int, int]:
    """Registers a thread, and bytes spilled, by the assembler that comes with triton."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    blackwell = int("".join(filter(str.isdigit, target[1]))) >= 100
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / ("ptxas-blackwell" if blackwell and (tools / "ptxas-blackwell").exists() else "ptxas")
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [ptxas, "-v", "--fmad=false", f"--gpu-name={target[1]}", source, "-o", folder / "kernel.cubin"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill", log)
    assert registers is not None
    assert spills
    return int(registers[1]), sum(map(int, spills))


def test_the_spill_check_sees_a_spill(tmp_path: Path) -> None:
    ptx, count = re.subn(
        r"(\.(?:req|max)ntid 128(?:, 1, 1)?)", r"\1\n.maxnreg 32", compiled("encode int8 fp32", 90).asm["ptx"]
    )
    assert count == 1
    registers, spilled = assemble(ptx, tmp_path)
    assert registers <= 32
    assert spilled > 0


@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_registers_suffice_without_spills(name: str, arch: int, tmp_path: Path) -> None:
    registers, spilled = assemble(compiled(name, arch).asm["ptx"], tmp_path)
    assert spilled == 0
    assert registers <= MAX_REGISTERS


@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_every_byte_moves_once_in_accesses_of_sixteen(name: str, arch: int) -> None:
    program, ptx = PROGRAMS[name](), compiled(name, arch).asm["ptx"]
    elements = program.constants["TILE"] / (32 * program.warps)  # of one thread
    loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
    assert loads[16] * 16 == elements * program.read
    assert stores[16] * 16 == elements * program.written
    assert (loads.keys() | stores.keys()) - {16} <= program.narrow


@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_no_operation_is_fused_approximate_or_flushes_denormals(name: str, arch: int) -> None:
    kernel = compiled(name, arch)
    forbidden = r"\b(?:fma|mad\.rn|rcp|div\.full|div\.approx|sqrt|ex2|\w+(?:\.\w+)*\.(?:ftz|approx|sat))[\w.]*"
    ptx, divisions = DIVISION.subn("", kernel.asm["ptx"])
    assert re.findall(forbidden, ptx) == []
    # Without an explicit rounding the assembler may fuse what the compiler kept apart.
    assert re.findall(r"\b(?:add|sub|mul)\.f(?:32|64)\b", ptx) == []
    assert not kernel.metadata.enable_fp_fusion
    assert (divisions > 0) == name.startswith("encode int")


@pytest.mark.parametrize("steps", [127, 8], ids=["int8", "int4"])
def test_no_operand_or_quotient_of_a_division_is_subnormal(steps: int) -> None:
    """So that one which flushes subnormals gives the same: from the least group that is not zero to the largest."""
    for largest in (np.nextafter(np.float32(2.0**-100), np.float32(1)), np.finfo(np.float32).max):
        step = np.float32(largest) / np.float32(steps)
        scale = ((step.view(np.int32) + np.int32(0xFFFF)) & np.int32(-0x10000)).view(np.float32)
        assert min(largest, step, scale, np.float32(1) / scale) >= np.finfo(np.float32).tiny


@pytest.mark.parametrize("name", ["encode int8 fp32", "accumulate int8"])
def test_the_check_for_fused_operations_sees_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(common.OPTIONS, "enable_fp_fusion", True)
    assert "fma.rn" in PROGRAMS[name]().compile(90).asm["ptx"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_offsets_of_tiles_have_64_bits(name: str) -> None:
    ttir = compiled(name, 90).asm["ttir"]
    programs = re.findall(r"(%\w+) = tt\.get_program_id x", ttir)
    assert len(programs) == 1
    uses = [line for line in ttir.splitlines() if re.search(rf"{re.escape(programs[0])}\b", line)][1:]
    assert uses
    assert all("arith.extsi" in line and "i32 to i64" in line for line in uses)


@pytest.mark.parametrize("format", SCALED)
def test_misaligned_codes_leave_the_other_accesses_wide(format: str) -> None:
    program = encode(format, "bf16", "bf16", word_bytes=2)
    ptx = program.compile(90, misaligned=("codes_ptr", "scales_ptr")).asm["ptx"]
    elements = program.constants["TILE"] / (32 * program.warps)
    assert accesses(ptx, "ld") == {16: elements * 8 / 16}
    stores = accesses(ptx, "st")
    assert stores[16] == elements * 4 / 16
    assert set(stores) == {16, 2}


def test_fingerprint_reads_full_tiles_in_accesses_of_sixteen(tmp_path: Path) -> None:
    module = import_module("parablock_rt.kernels.fingerprint")
    signature = {"words_ptr": "*i32", "sum_ptr": "*i64", "words": "i32"}
    program = Program(module.fingerprint_kernel, signature, {"TILE": module.TILE}, module.WARPS, 4, 0)
    ptx = program.compile(90).asm["ptx"]
    loads, words = accesses(ptx, "ld"), module.TILE // (32 * module.WARPS)
    assert loads == {16: words // 4, 4: words}  # the other path, of the last tile, has a mask
    assert accesses(ptx, "st") == {}
    registers, spilled = assemble(ptx, tmp_path)
    assert spilled == 0
    assert registers <= 64  # two blocks of sixteen warps


def test_cpu_tensors_are_refused_where_kernels_are_compiled() -> None:
    if common.INTERPRETED:
        pytest.skip("this process runs the interpreter")
    block = torch.zeros(128)
    with pytest.raises(ValueError, match=r"expected a CUDA tensor, found one on cpu; use parablock_rt\.codec"):
        kernels.encode(block, block)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_does_not_import_triton() -> None:
    assert run("import parablock_rt, sys; print('triton' in sys.modules)").strip() == "False"


def test_without_triton_the_kernels_can_be_imported_and_say_what_is_missing() -> None:
    code = """
import sys
sys.modules["triton"] = None
from parablock_rt import kernels
try:
    kernels.encode
except ImportError as error:
    print(error)
"""
    assert "expected the package triton, found none" in run(code)

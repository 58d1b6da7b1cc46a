"""Build of the native module `parablock_rt._C`: g++ (or clang++) and pybind11, nothing else.

Neither torch nor CUDA is looked at, so one build serves every torch version. The instruction-set variants of the
codec are separate functions chosen at run time, so the baseline flags stay portable.
"""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile("PARABLOCK_BUILD_JOBS", default=2).install()

COMPILE_FLAGS = [
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # codec.md: a fused multiply-add would change bytes
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror=return-type",
]

setup(
    ext_modules=[
        Pybind11Extension(
            "parablock_rt._C",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cc")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            include_dirs=["csrc"],
            cxx_std=20,
            extra_compile_args=COMPILE_FLAGS,
            extra_link_args=["-pthread"],
        )
    ]
)

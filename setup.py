"""Build of the native module `parablock_rt._C`: g++ (or clang++) and pybind11, and OpenSSL 3 where its headers are.

Neither torch nor CUDA is looked at, so one build serves every torch version. The instruction-set variants of the
codec are separate functions chosen at run time, so the baseline flags stay portable. PARABLOCK_TLS=0 builds without
TLS, PARABLOCK_TLS=1 fails where OpenSSL is missing.
"""

import os
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, SetupError

ParallelCompile("PARABLOCK_BUILD_JOBS", default=2).install()

COMPILE_FLAGS = [
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a fused multiply-add would change the codec's bytes, which are a contract
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror=return-type",
]

OPENSSL_TEST = """
#include <openssl/ssl.h>
#if OPENSSL_VERSION_NUMBER < 0x30000000L
#error too old
#endif
int main() { return SSL_CTX_new(TLS_method()) == nullptr; }
"""


class Build(build_ext):
    """Adds TLS if OpenSSL's headers and libraries are there."""

    def build_extensions(self) -> None:
        wanted = os.environ.get("PARABLOCK_TLS", "auto")
        found = wanted != "0" and self._finds_openssl()
        if wanted == "1" and not found:
            raise SetupError("PARABLOCK_TLS=1, but OpenSSL 3 was not found: install its headers (libssl-dev on Debian)")
        if found:
            for extension in self.extensions:
                extension.define_macros.append(("PARABLOCK_TLS", "1"))
                extension.libraries += ["ssl", "crypto"]
        elif wanted != "0":
            print("building without TLS: OpenSSL 3 was not found; its headers are in libssl-dev on Debian")
        super().build_extensions()

    def _finds_openssl(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "openssl.cc"
            source.write_text(OPENSSL_TEST)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder)
                self.compiler.link_executable(objects, str(Path(folder) / "openssl"), libraries=["ssl", "crypto"])
            except CCompilerError:
                return False
        return True


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Pybind11Extension(
            "parablock_rt._C",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cc")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            include_dirs=["csrc"],
            cxx_std=20,
            extra_compile_args=COMPILE_FLAGS,
            extra_link_args=["-pthread", "-ldl"],
        )
    ],
)

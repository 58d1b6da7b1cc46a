"""Instrumented builds of the native code, each in a folder of its own; the normal build is never touched.

The module goes through setup.py, so that what is instrumented is what ships: same sources, same flags, and the
sanitizer's on top. Programs without Python (the stress test, the fuzzers) have everything but the bindings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CLANG_PACKAGES = ("clang-19", "libclang-rt-19-dev")  # Debian's
INSTALL_LIMIT_S = 240
UNDEFINED = "undefined,float-cast-overflow"


@dataclass(frozen=True)
class Variant:
    """One kind of build. `program_flags` are for programs only, where a library must not have them."""

    name: str
    compiler: str
    sanitizers: str
    program_sanitizers: str = ""

    @property
    def folder(self) -> Path:
        """Where all of it goes; inside, `parablock_rt/` is a package of links to the sources with a _C of its own."""
        return ROOT / "build" / "hardening" / self.name

    @property
    def flags(self) -> list[str]:
        """For compiling and for linking. A finding ends the process; stacks can be read."""
        # g++ warns of the fence that the thread sanitizer does not know; docs/hardening.md names it.
        quiet = ["-Wno-tsan"] if self.name == "thread" else []
        return [f"-fsanitize={self.sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", *quiet]


def thread() -> Variant:
    """ThreadSanitizer, with g++."""
    return Variant("thread", "g++", "thread")


def address() -> Variant:
    """AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer, with g++."""
    return Variant("address", "g++", f"address,{UNDEFINED}")


def fuzzer(compiler: str) -> Variant:
    """The same with libFuzzer's coverage, with clang++; the programs get their main function from libFuzzer."""
    return Variant("fuzzer", compiler, f"fuzzer-no-link,address,{UNDEFINED}", "fuzzer")


def find_clang() -> str | None:
    """The newest clang++ of this machine that can link libFuzzer, installed by apt-get first where root may do so."""
    found = _usable_clang()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        print("clang++ with libFuzzer is not here; trying to install it with apt-get", flush=True)
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *CLANG_PACKAGES]):
            try:
                command = ["apt-get", "-qq", *arguments]
                subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=INSTALL_LIMIT_S)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                return None
        found = _usable_clang()
    return found


def _usable_clang() -> str | None:
    for name in [*(f"clang++-{version}" for version in range(22, 13, -1)), "clang++"]:
        if shutil.which(name) is None:
            continue
        source = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
        command = [name, "-fsanitize=fuzzer,address", "-x", "c++", "-", "-o", os.devnull]
        if subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0:
            return name
    return None


def build_module(variant: Variant) -> None:
    """Builds the extension module and the package around it. Does nothing when no source changed."""
    # As part of the compilers' names the flags are there whatever is linked, setup.py's own probes included.
    compiler = " ".join([variant.compiler, *variant.flags])
    probe = [sys.executable, "-c", "from parablock_rt import _C; print(bool(_C.TLS_LIBRARY) + 0)"]
    tls = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    environment = dict(os.environ) | {"CC": compiler, "CXX": compiler, "PARABLOCK_TLS": tls}  # as the normal build
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={variant.folder}"]
    command.append(f"--build-temp={variant.folder / 'module'}")
    _announce(variant, "module")
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    package = variant.folder / "parablock_rt"
    for source in (ROOT / "parablock_rt").iterdir():
        if source.suffix in (".py", ".pyi", ".typed"):
            (package / source.name).unlink(missing_ok=True)
            (package / source.name).symlink_to(source)
    for link in package.iterdir():
        if not link.exists():  # its source is gone
            link.unlink()


def build_programs(variant: Variant, programs: dict[str, list[str]]) -> dict[str, Path]:
    """Compiles the native code without its bindings and links programs of these sources of this folder with it."""
    folder = variant.folder / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    # The results must be the same bits as in the module; speed matters less than the time to compile.
    compile = [variant.compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", *variant.flags]
    compile += ["-I", str(ROOT / "csrc")]
    headers = [*(ROOT / "csrc").glob("*.h"), *HERE.glob("*.h"), Path(__file__)]
    newest_header = max(path.stat().st_mtime for path in headers)

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            subprocess.run([*compile, "-c", str(source), "-o", str(target)], check=True)
        return target

    _announce(variant, "programs")
    core = [path for path in (ROOT / "csrc").glob("*.cc") if not path.name.startswith("bind")]
    own = {HERE / source for sources in programs.values() for source in sources}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip([*core, *own], pool.map(compiled, [*core, *own]), strict=True))
    linked = {}
    for name, sources in programs.items():
        linked[name] = folder / name
        flags = [*variant.flags, *([f"-fsanitize={variant.program_sanitizers}"] if variant.program_sanitizers else [])]
        parts = [objects[path] for path in [*(HERE / source for source in sources), *core]]
        subprocess.run([variant.compiler, *flags, *parts, "-pthread", "-ldl", "-o", linked[name]], check=True)
    return linked


def _announce(variant: Variant, what: str) -> None:
    folder = variant.folder.relative_to(ROOT)
    print(f"building the {what} in {folder}: {variant.compiler} -fsanitize={variant.sanitizers}", flush=True)

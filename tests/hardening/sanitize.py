"""Runs the native code under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

`python tests/hardening/sanitize.py [--only address|thread] [--short]`. Each builds an instrumented module in
build/hardening/, then runs the native tests with it, the stress program and, under the first, the committed fuzzing
corpus. Any finding fails the run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import toolchain
from toolchain import HERE, ROOT, Variant

SHORT_TESTS = [
    "test_session.py",
    "test_session_lanes.py",
    "test_session_peers.py",
    "test_inspector.py",
    "test_transport.py",
    "test_shaper.py",
    "test_tls.py",
    "test_codec_golden.py",
]
TESTS = [
    *SHORT_TESTS,
    "test_transport_lanes.py",
    "test_transport_peers.py",
    "test_codec.py",
    "test_codec_accumulator.py",
    "test_codec_properties.py",
    "test_device_staging.py",
]
FEDERATION = [
    "test_staging.py",
    "test_timeline.py",
    "test_algorithm.py::test_a_fast_a_slow_and_a_jittery_link_give_the_same_digest",
]
FUZZ_TARGETS = ("frame", "session", "codec")
STRESS_ROUNDS, SHORT_STRESS_ROUNDS = 100, 20
LIMIT_S = 3600
OURS = ("parablock::", "parablock_rt/_C", "csrc/")  # in a stack, with debug information and without


def runtime(compiler_library: str) -> str:
    """The path of a runtime library of g++."""
    answer = subprocess.run(["g++", f"-print-file-name={compiler_library}"], capture_output=True, text=True, check=True)
    return str(Path(answer.stdout.strip()).resolve())


def environment(variant: Variant, logs: Path) -> dict[str, str]:
    """What a process needs so that an uninstrumented Python loads the instrumented module."""
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    log = f"log_path={logs / 'finding'}"
    ours = dict(os.environ) | {"PYTHONPATH": f"{variant.folder}{os.pathsep}{ROOT}"}
    if variant.name == "thread":
        options = f"{log}:suppressions={HERE / 'thread.supp'}:exitcode=66"
        return ours | {"LD_PRELOAD": runtime("libtsan.so"), "TSAN_OPTIONS": options}
    # libstdc++ must be there from the start, or the sanitizer cannot find the __cxa_throw that it wraps. Python's own
    # allocator keeps pointers where the leak check does not look, so malloc does its work. What Python and others never
    # free is no finding, so leaks do not decide the exit code: `leaks` reads them.
    return ours | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": f"{log}:detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1",
        "LSAN_OPTIONS": "exitcode=0:max_leaks=0",
        "UBSAN_OPTIONS": f"{log}:print_stacktrace=1",
    }


def leaks(report: str) -> Iterator[str]:
    """The leaks of a report whose stack goes through our module. Those of its import alone are static, not lost."""
    for stack in re.split(r"\n\n", report):
        if "leak of" in stack and any(mark in stack for mark in OURS) and "PyInit__C" not in stack:
            yield stack


def findings(variant: Variant, logs: Path) -> list[str]:
    """Every report under `logs` that is about our code."""
    found = []
    for path in sorted(logs.glob("finding.*")):
        report = path.read_text(errors="replace")
        if variant.name == "address" and "LeakSanitizer" in report:
            found += leaks(report)
        elif report.strip():
            found.append(report)
    return found


def run(variant: Variant, command: list[str | Path], name: str) -> bool:
    """Runs a command with the variant's runtime; says and returns whether it passed without a finding."""
    logs = variant.folder / "logs" / name
    ours = environment(variant, logs)
    if command[0] != sys.executable:  # a program that has the runtime in it
        del ours["LD_PRELOAD"]
        ours["LSAN_OPTIONS"] = ""
    # ThreadSanitizer cannot map its shadow where address randomisation may put a library.
    prefix = ["setarch", "-R"] if variant.name == "thread" else []
    code = subprocess.run([*prefix, *command], env=ours, cwd=ROOT, check=False, timeout=LIMIT_S).returncode
    reports = findings(variant, logs)
    for report in reports:
        print(report)
    passed = code == 0 and not reports
    print(
        f"{variant.name}: {name} {'passed' if passed else f'FAILED (exit {code}, {len(reports)} findings)'}", flush=True
    )
    return passed


def check(variant: Variant, short: bool) -> bool:
    """Builds and runs everything of one variant."""
    targets = FUZZ_TARGETS if variant.name == "address" else ()
    replays = {target: [f"fuzz_{target}.cc", "replay.cc"] for target in targets}
    programs = toolchain.build_programs(variant, {"stress": ["stress.cc"]} | replays)
    rounds = SHORT_STRESS_ROUNDS if short else STRESS_ROUNDS
    passed = [run(variant, [programs["stress"], str(rounds)], "stress")]
    passed += [run(variant, [programs[target], HERE / "corpus" / target], f"corpus-{target}") for target in targets]
    toolchain.build_module(variant)
    # -P: the package of the working directory must not hide the instrumented one.
    pytest = [sys.executable, "-c", "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main())"]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "timeout=600"]
    tests = [ROOT / "tests" / name for name in (SHORT_TESTS if short else TESTS) + FEDERATION]
    passed.append(run(variant, [*pytest, *options, *tests], "pytest"))
    return all(passed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["address", "thread"], nargs="+", default=["address", "thread"])
    parser.add_argument("--short", action="store_true", help="fewer tests and rounds, for CI")
    options = parser.parse_args()
    made = {"address": toolchain.address, "thread": toolchain.thread}
    results = [check(made[name](), options.short) for name in options.only]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()

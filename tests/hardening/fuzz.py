"""Coverage-guided fuzzing of everything that reads what a peer sends.

`python tests/hardening/fuzz.py [--only TARGET ...] [--seconds 60]`. The native targets need a clang++ that has
libFuzzer, which is installed by apt-get where that can be done; the target `messages` needs the Python package atheris.
What cannot run is said and left out. New inputs stay in build/hardening/corpus/, and one that fails as `found-*`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import toolchain
from toolchain import HERE, ROOT

NATIVE = ("frame", "session", "codec")
TARGETS = (*NATIVE, "messages")
MOST_BYTES = 4096
SLACK_S = 120


def commands(targets: list[str]) -> dict[str, list[str | Path]]:
    """How to start each target that can run here; says why for the others."""
    found: dict[str, list[str | Path]] = {}
    native = [target for target in targets if target in NATIVE]
    compiler = toolchain.find_clang() if native else None
    if compiler is not None:
        sources = {target: [f"fuzz_{target}.cc"] for target in native}
        programs = toolchain.build_programs(toolchain.fuzzer(compiler), sources)
        found |= {target: [program] for target, program in programs.items()}
    elif native:
        print(f"fuzz: SKIPPED {', '.join(native)}: no clang++ with libFuzzer here, and apt-get could not install one")
    if "messages" in targets:
        probe = subprocess.run([sys.executable, "-c", "import atheris"], capture_output=True, check=False)
        if probe.returncode == 0:
            found["messages"] = [sys.executable, HERE / "fuzz_messages.py"]
        else:
            print(
                "fuzz: SKIPPED messages: `pip install atheris` first (tests/test_hostile_messages.py runs without it)"
            )
    return found


def fuzz(target: str, command: list[str | Path], seconds: int) -> bool:
    """Runs one target; returns whether nothing was found."""
    work = ROOT / "build" / "hardening" / "corpus" / target
    work.mkdir(parents=True, exist_ok=True)
    log = work.parent / f"{target}.log"
    options = [f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}", "-timeout=20", "-rss_limit_mb=2048"]
    options += ["-print_final_stats=1", f"-dict={HERE / 'corpus' / 'words.dict'}", f"-artifact_prefix={work}/found-"]
    environment = dict(os.environ) | {"UBSAN_OPTIONS": "print_stacktrace=1"}
    with log.open("w") as output:
        code = subprocess.run(
            [*command, *options, work, HERE / "corpus" / target],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            check=False,
            timeout=seconds + SLACK_S,
        ).returncode
    lines = log.read_text(errors="replace").splitlines()
    runs = next((line.split()[-1] for line in lines if line.startswith("stat::number_of_executed_units")), "no")
    if code == 0:
        print(f"fuzz: {target}: {runs} inputs in {seconds} s, nothing found", flush=True)
        return True
    print("\n".join(lines[-60:]))
    print(f"fuzz: {target}: FAILED after {runs} inputs; all of it is in {log.relative_to(ROOT)}, the input beside it")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TARGETS, nargs="+", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    options = parser.parse_args()
    passed = [fuzz(target, command, options.seconds) for target, command in commands(options.only).items()]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()

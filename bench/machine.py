"""The facts that a benchmark's numbers depend on, to be stored with them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from parablock_rt import _C
from parablock_rt.version import __version__

PACKAGES = ("torch", "triton", "numpy", "transformers")


def machine() -> dict[str, object]:
    """The machine, the versions, the revision of the code and the command. Reveals no host and no folder: keeps only
    the last part of an absolute path in the command."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    program = "bench" if "bench" in sys.argv[:2] else module or f"bench.{Path(sys.argv[0]).stem}"
    command = ["parablock", *sys.argv[1:]] if program == "bench" else ["python", "-m", program, *sys.argv[1:]]
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg(),
        "instruction_set": _C.instruction_set(),
        "release": __version__,
        **{name: found for name in PACKAGES if (found := _version(name)) is not None},
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": _revision(),
        "command": " ".join(Path(word).name if Path(word).is_absolute() else word for word in command),
    }


def gpu() -> dict[str, object]:
    """The GPU that torch uses, if there is one. The call initialises CUDA in torch, so make settings such as
    PYTORCH_CUDA_ALLOC_CONF before it."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    about = {"gpu": found.name, "gpu_memory_bytes": found.total_memory, "gpu_l2_bytes": found.L2_cache_size}
    return about | {"gpu_processors": found.multi_processor_count, "cuda": torch.version.cuda}


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


_CODE = (":/", ":!/bench/results", ":!/docs", ":!/*.md")  # new results and pages do not change the code


def _revision() -> str:
    """The revision of the checkout that this file belongs to, with "-dirty" if the code was changed since. Without git,
    and for a package installed inside another project's checkout: PARABLOCK_REVISION, else "unknown"."""
    file = Path(__file__)
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return os.environ.get("PARABLOCK_REVISION") or "unknown"
    found = _git(file.parent, "rev-parse", "HEAD") or "unknown"
    return found if _git(file.parent, "diff-index", "--quiet", "HEAD", "--", *_CODE) is not None else f"{found}-dirty"


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git; None if git fails or is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

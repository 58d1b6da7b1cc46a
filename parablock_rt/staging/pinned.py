"""Host memory that a GPU copies from and to at full speed: one pinned slab of known size, cut into buffers.

Pinning is slow and takes memory from other processes, so it happens once, up to a cap. Buffers that do not fit, or all
of them if the system refuses to pin, are pageable memory: everything still works, but the training thread waits for the
copies.
"""

from __future__ import annotations

import logging

from parablock_rt import _C, limits
from parablock_rt.blocks.layout import Block
from parablock_rt.errors import ConfigError

log = logging.getLogger("parablock")

_PAGE = 4096
COUNT_BYTES = 8


def bytes_needed(blocks: list[Block], format: str, staleness: int) -> int:
    """Bytes of pinned memory that a client's run uses: the residuals of all blocks and the bodies under way.

    Up to `staleness + 1` hand-overs are under way; each has a body, and a second residual until the verdict.
    `staleness + 2` landings are open. Three bodies are spare, as native threads release theirs a moment late.
    """
    residuals = [0 if format == "fp32" else sum(_pages(4 * s.length) for s in block.segments) for block in blocks]
    bodies = 2 * (staleness + 3)
    body = buffer_bytes(max(block.wire_bytes(format) for block in blocks))
    return sum(residuals) + (staleness + 1) * max(residuals) + bodies * _pages(body)


def buffer_bytes(nbytes: int) -> int:
    """Bytes of the buffer for a body of `nbytes`, with room after the body for the count of bad groups."""
    return -(-nbytes // 8) * 8 + COUNT_BYTES


def default_cap() -> int:
    """Half of the memory that this process may use, in bytes."""
    return limits.memory_bytes() // 2


class PinnedMemory:
    """A pinned slab, and pageable memory for requests that do not fit. Any thread."""

    def __init__(self, driver: _C.Driver, needed: int, cap: int | None = None) -> None:
        """Pins `needed` bytes, at most `cap` (half of the memory that this process may use if None; 0: pin nothing).

        Raises ConfigError for a negative cap.
        """
        if cap is not None and cap < 0:
            raise ConfigError(f"expected pinned memory to be 0 bytes or more, found {cap}")
        cap = default_cap() if cap is None else cap
        self.needed = needed
        self._slab: _C.Slab | None = None
        self._overflowed = needed > cap
        if self._overflowed:
            log.warning(
                "pinning %s of host memory instead of the %s that the run needs (limited by --pinned-memory or to half "
                "of the memory that this process may use); copies of the rest are slower and the training waits for "
                "them. Raise --pinned-memory if the machine has enough memory",
                _mib(cap),
                _mib(needed),
            )
        size = min(needed, cap)
        if size < _PAGE:
            return
        try:
            self._slab = _C.Slab(driver, size)
            log.info("pinned %s of host memory", _mib(self._slab.nbytes))
        except (_C.DeviceError, MemoryError) as error:
            self._overflowed = True
            log.warning(
                "expected to pin %s of host memory, but the system refused (%s); using pageable memory: copies are "
                "slower and the training waits for them. Free memory, raise the limit (ulimit -l), or lower "
                "--pinned-memory",
                _mib(size),
                error or "out of memory",
            )

    @property
    def nbytes(self) -> int:
        """Pinned bytes."""
        return 0 if self._slab is None else self._slab.nbytes

    @property
    def used(self) -> int:
        """Pinned bytes in use."""
        return 0 if self._slab is None else self._slab.used

    def take(self, nbytes: int) -> _C.Buffer:
        """A page-aligned buffer with arbitrary contents, pinned if there is room."""
        buffer = None if self._slab is None else self._slab.take(nbytes)
        if buffer is not None:
            return buffer
        if not self._overflowed:
            self._overflowed = True
            log.warning(
                "the %s of pinned memory have no room for %s more; using pageable memory for these",
                _mib(self.nbytes),
                _mib(nbytes),
            )
        return _C.Buffer(nbytes)


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"

"""The errors of the package. Each message says what was expected, what was found and what to do."""

from __future__ import annotations


class ParaBlockError(Exception):
    """Base of all errors raised by the package."""


class ConfigError(ParaBlockError, ValueError):
    """A setting has a value that no run can use."""


class PlanError(ParaBlockError):
    """A model cannot be partitioned into blocks as asked."""


class PlanMismatchError(PlanError):
    """Server and client partition different models; the message names the first parameter in which they differ."""


class CodecError(ParaBlockError, ValueError):
    """A tensor or a packed body does not fit the codec's rules."""


class TransportError(ParaBlockError):
    """The network between client and server failed."""


class ConnectError(TransportError):
    """The server could not be reached; the message has the address and the number of tries."""


class HandshakeError(TransportError):
    """The two sides do not fit: another protocol version, run, token or configuration."""


class PeerLostError(TransportError):
    """The peer vanished in the middle of a run."""


class WaitTimeoutError(PeerLostError):
    """The peer is there, as far as is known, but what was waited for did not come in time."""


class CheckpointError(ParaBlockError):
    """A server's durable state is damaged, in use, or of another run."""


class DeviceMemoryError(ParaBlockError):
    """A device has less free memory than the run will take; the message has the prediction, item by item."""


class RoundError(ParaBlockError):
    """A round could not be closed: too few clients delivered before the deadline."""


class DigestError(ParaBlockError):
    """The weights of two sides that must hold the same bits differ."""


class TraceError(ParaBlockError):
    """A trace file cannot be used: it is damaged, of another kind, or of another clock."""

"""The errors of the package. Each message says what was expected, what was found and what to do."""

from __future__ import annotations


class ParaBlockError(Exception):
    """Base of all errors raised by the package."""


class ConfigError(ParaBlockError, ValueError):
    """A setting has a value that no run can use."""


class PlanError(ParaBlockError):
    """A model cannot be partitioned into blocks as asked."""


class PlanMismatchError(PlanError):
    """The plans of server and client differ, or do not fit the model; the message names the first difference."""


class CodecError(ParaBlockError, ValueError):
    """A tensor or a packed body does not fit the codec's rules."""


class TransportError(ParaBlockError):
    """The network between client and server failed."""


class ConnectError(TransportError):
    """The server could not be reached; the message has the address and the number of tries."""


class HandshakeError(TransportError):
    """The two sides do not fit together: another protocol version, run, token, TLS setting or configuration; or one
    side refuses the other."""


class PeerLostError(TransportError):
    """The peer vanished in the middle of a run."""


class WaitTimeoutError(PeerLostError):
    """The connection seems to work, but the peer did not deliver in time."""


class CheckpointError(ParaBlockError):
    """A server's durable state is damaged, in use, or belongs to another run."""


class DeviceMemoryError(ParaBlockError):
    """A device has less free memory than the run will take; the message lists the prediction item by item."""


class RoundError(ParaBlockError):
    """A round could not be closed: too few clients delivered before the deadline."""


class StoppedError(ParaBlockError):
    """The server was stopped by its owner before the run had ended."""


class DigestError(ParaBlockError):
    """The weights of client and server differ where they must have the same bits."""


class TraceError(ParaBlockError):
    """A trace file cannot be used: it is damaged, not a trace, or uses another clock."""

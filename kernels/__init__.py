"""The codec on a GPU: Triton kernels that give the same bytes as `parablock_rt.codec`, installed as
`parablock_rt.kernels`.

One launch per block and operation, on the current stream, without waiting for the device. Needs torch and triton, but
not the runtime. Without triton the package can be imported, but using it raises ImportError. With TRITON_INTERPRET=1 in
the environment before the first import the kernels run on the CPU, slowly.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

__all__ = ["Packed", "accumulate", "apply_", "decode", "empty_body", "encode", "fingerprint", "fingerprint_on_device"]

if TYPE_CHECKING or find_spec("triton") is not None:
    from .accumulate import accumulate
    from .apply import apply_
    from .common import empty_body
    from .decode import decode
    from .encode import Packed, encode
    from .fingerprint import fingerprint, fingerprint_on_device
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(
                f"parablock_rt.kernels.{name}: expected the package triton, found none; install it "
                "(`pip install triton`), or keep the tensors on the CPU"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

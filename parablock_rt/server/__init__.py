"""The aggregation server. Imports nothing of the client."""

from parablock_rt.server.server import Server, serve

__all__ = ["Server", "serve"]

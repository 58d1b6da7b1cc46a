"""Everything that concerns the wire: the Python interface of the native transport, the handshake, the messages, TLS.

Knows nothing of models, and of rounds only the numbers in the messages.
"""

"""What goes over the wire: the native transport's Python face, the handshake, the messages, TLS.

Knows no model, and of rounds only the numbers that messages carry.
"""

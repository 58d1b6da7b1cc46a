"""What goes over the wire: the native transport's Python face, the handshake, the messages, TLS.

Knows neither rounds nor models.
"""

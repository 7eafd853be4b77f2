"""Ports for servers that bind them later."""

import random
import socket
from contextlib import suppress


def free_ports(count: int) -> list[int]:
    """Free ports below those that the system gives to anyone who asks for any, so that they stay free."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with socket.socket() as some, suppress(OSError):
            some.bind(("", port))
            ports.add(port)
    return list(ports)

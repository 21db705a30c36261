"""Ports of this machine on which nobody listens."""

from __future__ import annotations

import socket

RAY = frozenset({8265, 10001, 44217, 44227, 52365})
"""Ports that every Ray takes by itself, where they are free: a server of ours there would be in its way."""


def free_ports(count: int) -> list[int]:
    """So many different ones; held until all are found."""
    probes: list[socket.socket] = []
    try:
        found: list[int] = []
        while len(found) < count:
            probes.append(socket.socket())
            probes[-1].bind(("127.0.0.1", 0))
            port = probes[-1].getsockname()[1]
            if port not in RAY:
                found.append(port)
        return found
    finally:
        for probe in probes:
            probe.close()


def free_port() -> int:
    """One."""
    return free_ports(1)[0]

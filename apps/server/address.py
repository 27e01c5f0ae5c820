"""Where the server listens, and who can reach it there."""

from __future__ import annotations

import ipaddress
import os
import socket

from mlx_hiermem.errors import HierMemError


def bind(host: str, port: int, api_key: str) -> socket.socket:
    """The listening socket; port 0 takes a free one. Raises HierMemError where it cannot be had, or may not."""
    if not api_key and not is_loopback(host):
        raise HierMemError(
            f"{host} can be reached from other machines, and there is no API key",
            "Set HIERMEM_API_KEY, or listen on 127.0.0.1.",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 0  # below zero the host's name is unknown
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)
        raise HierMemError(
            f"cannot listen on {host} port {port}: {reason}", "Choose another with --port."
        ) from error


def address(listening: socket.socket) -> str:
    """Where a browser of this machine finds it: every address is not one that can be opened."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(name: str) -> bool:
    """Whether a host name or address is this machine's own, for itself only."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

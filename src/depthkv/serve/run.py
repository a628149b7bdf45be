"""Runs the embedded server, until a signal: what was accepted is answered first."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from depthkv.errors import DepthKVError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def allowed_hosts(host: str, address: str) -> Sequence[str] | None:
    """Names by which a server may be called; None where others may have their own for it.

    Args:
        host: as the operator says it.
        address: that it is bound to.
    """
    if not ipaddress.ip_address(address).is_loopback:
        return None
    return [*LOOPBACK, host, address, "[::1]", "["]  # starlette cuts "[::1]:8000" at its first colon


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port that is taken is known before the model is loaded; port 0 takes a free one.

    Raises:
        DepthKVError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError) as problem:
        made.close()
        reason = getattr(problem, "strerror", None) or problem
        raise DepthKVError(f"--host, --port: expected a free address, got {host}:{port}: {reason}") from problem
    return made


def server(app: FastAPI, drain_s: int) -> uvicorn.Server:
    """What answers; at its end it takes no new connection and finishes what runs and waits, for so many seconds."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=drain_s,
        timeout_keep_alive=30,
        server_header=False,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """Says what a signal does, and ends without tracebacks of what a second one cut off."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        else:
            print("finishing what was accepted; Ctrl-C once more cuts it off", file=sys.stderr, flush=True)
        super().handle_exit(sig, frame)


def serve(app: FastAPI, listening: socket.socket, drain_s: int) -> None:
    """Answer until SIGTERM or SIGINT.

    Args:
        app: see `depthkv.serve.app.create_app`.
        listening: see `bind`.
        drain_s: see `server`.
    """
    # uvicorn raises the signal again when it is done, and a drained server has not failed
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        server(app, drain_s).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)

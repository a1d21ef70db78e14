"""Whether the other trainer ranks of a group live: each listens, and rank 0 keeps a connection.

NCCL does not say that a peer has died, where the two are joined by NVLink, and no rank waits for
all others. The system closes what a dead process held, so a connection that ends says so.
"""

from __future__ import annotations

import socket

from engine.errors import GroupError

_DIAL_S = 10.0


class Peers:
    """own_address: of a rank that listens, at a free port; "" for rank 0, which watches."""

    def __init__(self, own_address: str) -> None:
        self._listener = socket.create_server((own_address, 0)) if own_address else None
        self._watched: dict[int, socket.socket] = {}

    @property
    def own(self) -> str:
        """Where this rank listens, for `watch`; "" if it does not."""
        if self._listener is None:
            return ""
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def watch(self, rank: int, place: str) -> None:
        """Connect to trainer rank `rank`. Raises GroupError if it is gone already."""
        host, _, port = place.rpartition(":")
        try:
            peer = socket.create_connection((host, int(port)), timeout=_DIAL_S)
        except (OSError, ValueError) as error:
            raise GroupError(
                f"trainer rank {rank} does not answer at {place!r} ({error})", field=f"rank {rank}"
            ) from error
        peer.setblocking(False)
        self._watched[rank] = peer

    def check(self) -> None:
        """Raise GroupError naming a watched rank that is gone."""
        for rank, peer in self._watched.items():
            try:
                gone = not peer.recv(1)
            except BlockingIOError:
                continue
            except OSError:
                gone = True
            if gone:
                raise GroupError(f"trainer rank {rank} left, or died", field=f"rank {rank}")

    def close(self) -> None:
        """Whoever watches this rank notices. Idempotent."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for peer in self._watched.values():
            peer.close()
        self._watched.clear()

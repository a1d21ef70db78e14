"""What control commands may reach outside the engine: folders of weights, and addresses to meet at.

The keys of a server say who may call; this says what the caller may point the engine at. A server
bound to loopback allows everything that its user could do himself, unless an option says less.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from fastapi import Request

from engine.errors import Forbidden, InvalidRequest
from engine.protocol import Command, JoinGroup, LoadFromDisk, StartProfile
from rollout.http.config import ServeConfig


class Access:
    """The folders and addresses that one server's configuration opens."""

    def __init__(self, config: ServeConfig) -> None:
        self._exposed = not is_loopback(config.host)
        self._host = config.host
        self._roots = [Path(root).absolute() for root in config.weights_roots]
        self._rendezvous = config.rendezvous_hosts
        root = config.profile_root or Path(tempfile.gettempdir(), "slipstream-profiles")
        self._profiles = Path(root).resolve()

    def check(self, command: Command) -> None:
        """Raise Forbidden for a command whose folder is closed; every command passes here on
        its way to the engine, whichever route it came by."""
        if isinstance(command, LoadFromDisk):
            self.check_folder(command.path)
            self.check_links(command.path)
        elif isinstance(command, StartProfile):
            self.profile_folder(command.folder)

    def check_folder(self, path: str) -> None:
        """Raise Forbidden (`path`) unless the folder or file, its links followed, is below a
        `--weights-root`; without roots, unless only this machine reaches the server."""
        if not self._roots:
            if self._exposed:
                raise Forbidden(
                    f"the server listens at {self._host} and reads weights from no folder; start "
                    "it with --weights-root DIR (which may be given several times)",
                    field="path",
                )
            return
        real, roots = _real(path, "path"), self._real_roots()
        # A file of a snapshot is itself a link to a blob.
        beside = roots + hub_blobs(_real(os.path.dirname(path), "path"), roots)
        if not any(real.is_relative_to(root) for root in beside):
            raise Forbidden(
                f"{path[:200]} is outside of {self._named_roots()}; put the weights there, or "
                "start the server with another --weights-root",
                field="path",
            )

    def check_links(self, path: str) -> None:
        """Raise Forbidden (`path`), naming the link, for one in the folder, or beside the file,
        that leads out of the roots; without roots there is nothing to leave. Those of a hub's cache
        may lead to its blobs. They are looked at now: whoever may write below a root is trusted not
        to exchange them meanwhile."""
        if not self._roots:
            return
        real, roots = _real(path, "path"), self._real_roots()
        folder = real if real.is_dir() else _real(os.path.dirname(path), "path")
        open_to = roots + hub_blobs(folder, roots)
        for link in links_in(folder):
            if not any(_real(str(link), "path").is_relative_to(place) for place in open_to):
                raise Forbidden(
                    f"{str(link)[:200]} is a link that leads out of {self._named_roots()}; put the "
                    "file itself there, or start the server with another --weights-root",
                    field="path",
                )

    def _real_roots(self) -> list[Path]:
        """Where the roots are now: one may be a link to the run that is the latest."""
        return [_real(str(root), "path") for root in self._roots]

    def _named_roots(self) -> str:
        return ", ".join(str(root) for root in self._roots)

    def profile_folder(self, path: str | None) -> str:
        """The folder that a profile is written to: `path`, or one of the root where none is
        given. Raises Forbidden (`output_dir`) unless it is below the root, links followed."""
        if path is None:
            return str(self._profiles)
        real = _real(path, "output_dir")
        if not real.is_relative_to(self._profiles):
            raise Forbidden(
                f"{path[:200]} is outside of {self._profiles}; leave output_dir out, or start the "
                "server with another --profile-root",
                field="output_dir",
            )
        return str(real)

    async def checked_join(self, command: JoinGroup, caller: str) -> JoinGroup:
        """The command, with the address that was checked in place of its name, which may stand
        for another one when the engine looks it up.

        Raises Forbidden (`address`) unless the engine may connect to the address that a group
        meets at: one of `--rendezvous-host`, or `caller`'s own. Bound to loopback, without
        such options, any address will do."""
        if not self._rendezvous and not self._exposed:
            return command
        if command.unique_id:
            await self._checked_address(_address_within(command.unique_id), caller)
        address = await self._checked_address(command.address, caller)
        return msgspec.structs.replace(command, address=address)

    async def _checked_address(self, host: str, caller: str) -> str:
        """`host` if it is an address or a name that the configuration allows, whatever that
        stands for; else one of its addresses, all of which are open."""
        if host.lower() in (entry.lower() for entry in self._rendezvous):
            return host
        addresses = await _addresses(host)
        if addresses and all(self._open(address, caller) for address in addresses):
            # The same each time, and where there is a choice what every listener has.
            return min(addresses, key=lambda address: (":" in address, address))
        raise Forbidden(
            f"the engine may not meet a trainer at {host[:200]}: it is neither the "
            f"caller's own address ({caller}) nor one of --rendezvous-host HOST or NETWORK, such "
            "as 10.0.0.0/8 (which may be given several times)",
            field="address",
        )

    def _open(self, address: str, caller: str) -> bool:
        found = _plain(address)
        if found is None:
            return False
        if found == _plain(caller):
            return True
        return any(found in network for entry in self._rendezvous if (network := _network(entry)))


def links_in(folder: Path) -> Iterator[Path]:
    """Every link in a folder and in those within it; a link to a folder is not entered."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found = Path(place, name)
            if found.is_symlink():
                yield found


def hub_blobs(folder: Path, roots: Sequence[Path]) -> list[Path]:
    """Where the links of a folder lead that is a snapshot in a cache of Hugging Face's hub, which
    is laid out as models--OWNER--NAME/{blobs,snapshots/REVISION}. Empty for another folder, and
    for one outside of `roots`."""
    if not any(folder.is_relative_to(root) for root in roots):
        return []
    for place in (folder, *folder.parents):
        model = place.parent.parent
        if place.parent.name == "snapshots" and model.name.startswith("models--"):
            return [model / "blobs"]
    return []


def _real(path: str, field: str) -> Path:
    """The path with its links followed. Raises InvalidRequest for what no path can be."""
    try:
        return Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidRequest(f"{field} is no folder's name: {error}", field=field) from error


def caller(request: Request) -> str:
    """The address a request comes from; "" where there is none, as over a Unix socket."""
    return request.client.host if request.client is not None else ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host.lower() == "localhost":
        return True
    address = _plain(host)
    return address is not None and address.is_loopback


def _plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address; one of IPv4 that is written as IPv6 as the former; None for a name."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _address_within(unique_id: bytes) -> str:
    """Where NCCL meets by an id: eight bytes of magic, then the socket address of rank 0
    (`ncclBootstrapHandle` in NCCL's src/include/bootstrap.h)."""
    family = int.from_bytes(unique_id[8:10], sys.byteorder) if len(unique_id) >= 32 else None
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(unique_id[12:16]))
    if family == socket.AF_INET6:
        return str(ipaddress.IPv6Address(unique_id[16:32]))
    return "an unknown address within the NCCL id"


async def _addresses(host: str) -> list[str]:
    """What a name stands for; empty if nothing is known of it."""
    if _plain(host) is not None:
        return [host]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(entry[4][0]) for entry in found]

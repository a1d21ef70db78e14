"""Which folders and addresses a caller may point the engine at."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.errors import Forbidden, InvalidRequest
from engine.protocol import JoinGroup, LoadFromDisk
from rollout.http.config import ServeConfig
from rollout.http.edge.access import Access
from tests.helpers.http_app import run, serving

ADMIN = {"authorization": "Bearer a"}
EXPOSED: dict[str, Any] = {"host": "0.0.0.0", "admin_api_key": "a"}
CALLER = "127.0.0.1"


def access(**options: Any) -> Access:
    return Access(ServeConfig(engine=EngineConfig(model="m"), **options))


def join(address: str) -> JoinGroup:
    return JoinGroup(name="g", address=address, port=1, rank_offset=1, world_size=2)


def test_a_loopback_server_reads_any_folder_and_meets_anybody() -> None:
    async def test() -> None:
        found = access()
        found.check(LoadFromDisk(path="/etc"))
        await found.checked_join(join("192.0.2.1"), CALLER)

    run(test)


def test_folders_are_below_a_root_after_links_are_followed(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "rootless"
    (root / "v1").mkdir(parents=True)
    other.mkdir()
    (root / "link").symlink_to(other)
    (other / "back").symlink_to(root / "v1")
    found = access(weights_roots=(str(root),))
    for path in (root, root / "v1", root / "absent", other / "back", root / "x" / ".." / "v1"):
        found.check_folder(str(path))
    for path in (other, root / "link", root / "..", root / ".." / "rootless", Path("/")):
        with pytest.raises(Forbidden, match="--weights-root") as caught:
            found.check_folder(str(path))
        assert caught.value.field == "path"
    with pytest.raises(InvalidRequest):
        found.check_folder("a\0b")


def test_a_root_that_is_a_link_is_where_it_leads_now(tmp_path: Path) -> None:
    for run_name in ("run1", "run2"):
        (tmp_path / run_name / "v1").mkdir(parents=True)
    latest = tmp_path / "latest"
    latest.symlink_to(tmp_path / "run1")
    found = access(weights_roots=(str(latest),))
    for run_name, other in (("run1", "run2"), ("run2", "run1")):
        latest.unlink()
        latest.symlink_to(tmp_path / run_name)
        found.check_folder(str(latest / "v1"))
        found.check_folder(str(tmp_path / run_name / "v1"))
        with pytest.raises(Forbidden, match="latest"):
            found.check_folder(str(tmp_path / other / "v1"))


def test_a_link_within_a_folder_stays_below_the_roots(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "v1" / "parts").mkdir(parents=True)
    (root / "shared").mkdir()
    other.mkdir()
    for place in (root / "shared" / "a", other / "a"):
        place.touch()
    (root / "v1" / "a").symlink_to(root / "shared" / "a")
    (root / "v1" / "b").symlink_to("../shared/absent")
    (root / "v1" / "back").symlink_to(other)
    found, unbound = access(weights_roots=(str(root),)), access()
    both = access(weights_roots=(str(root), str(other)))
    for place, target in (("back", other), ("parts/c", other / "a"), ("d", "../../other/a")):
        (root / "v1" / "back").unlink(missing_ok=True)
        found.check(LoadFromDisk(path=str(root / "v1")))
        link = root / "v1" / place
        link.symlink_to(target)
        with pytest.raises(Forbidden, match=f"{place} is a link that leads out") as caught:
            found.check(LoadFromDisk(path=str(root / "v1")))
        assert caught.value.field == "path"
        with pytest.raises(Forbidden):
            found.check(LoadFromDisk(path=str(root / "v1" / "model.safetensors.index.json")))
        for other_access in (unbound, both):
            other_access.check(LoadFromDisk(path=str(root / "v1")))
        link.unlink()


@pytest.mark.parametrize("root", ["", "models--o--m", "models--o--m/snapshots/r1"])
def test_a_snapshot_of_a_hub_is_read_with_its_blobs(root: str, tmp_path: Path) -> None:
    model = tmp_path / "models--o--m"
    snapshot = model / "snapshots" / "r1"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "f00").touch()
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00")
    found = access(weights_roots=(str(tmp_path / root),))
    for path in (snapshot, snapshot / "model.safetensors"):
        found.check(LoadFromDisk(path=str(path)))
    (snapshot / "more").symlink_to(tmp_path / ".." / "elsewhere")
    with pytest.raises(Forbidden, match="more is a link"):
        found.check(LoadFromDisk(path=str(snapshot)))


def test_a_name_like_a_hubs_opens_nothing_outside_of_the_roots(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "models--o--m").mkdir(parents=True)
    blobs = tmp_path / "models--o--m" / "blobs"
    snapshot = tmp_path / "models--o--m" / "snapshots" / "r1"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "f00").touch()
    (root / "snapshots").symlink_to(snapshot.parent)
    with pytest.raises(Forbidden):
        access(weights_roots=(str(root),)).check(LoadFromDisk(path=str(root / "snapshots" / "r1")))


def test_a_pull_follows_no_link_out_of_the_roots(tmp_path: Path) -> None:
    async def test() -> None:
        root, other = tmp_path / "root", tmp_path / "other"
        version = root / "published" / "weight_v000001"
        version.mkdir(parents=True)
        other.mkdir()
        (other / "model.safetensors").write_bytes(b"secret")
        (version / "model.safetensors").symlink_to(other / "model.safetensors")
        async with serving(weights_roots=(str(root),)) as server:
            body = {
                "target_version": 1,
                "local_checkpoint_dir": str(root / "local"),
                "source_dir": str(root / "published"),
            }
            reply = await server.post("/pull_weights", body)
            assert reply.status_code in (400, 403)
            assert "is a link that leads out" in reply.text
            assert not (root / "local").exists()

    run(test)


def test_an_exposed_server_without_a_root_names_the_option() -> None:
    with pytest.raises(Forbidden, match="--weights-root DIR"):
        access(**EXPOSED).check(LoadFromDisk(path="/x"))


@pytest.mark.parametrize(
    "path,body",
    [
        ("/command", {"type": "load_from_disk", "path": "/etc"}),
        ("/update_weights_from_disk", {"model_path": "/etc"}),
        (
            "/pull_weights",
            {"target_version": 1, "local_checkpoint_dir": "/l", "source_dir": "/etc"},
        ),
        ("/pull_weights", {"target_version": 1, "local_checkpoint_dir": "/etc"}),
        ("/update_weights", {"weight_dir": "/etc"}),
    ],
)
def test_every_route_that_reads_a_folder_is_held_to_the_root(
    path: str, body: dict[str, Any], tmp_path: Path
) -> None:
    async def test() -> None:
        for options in (EXPOSED, {**EXPOSED, "weights_roots": (str(tmp_path),)}):
            async with serving(**options) as server:
                reply = await server.post(path, body, headers=ADMIN)
                assert reply.status_code in (400, 403), reply.text
                assert "--weights-root" in reply.text
                assert LoadFromDisk not in map(type, server.commands())

    run(test)


@pytest.mark.parametrize(
    "options,address,caller,opens",
    [
        (EXPOSED, "10.0.0.2", "10.0.0.2", True),
        (EXPOSED, "10.0.0.3", "10.0.0.2", False),
        (EXPOSED, "127.0.0.1", "10.0.0.2", False),
        (EXPOSED, "localhost", CALLER, True),
        (EXPOSED, "::ffff:10.0.0.2", "10.0.0.2", True),
        (EXPOSED, "", "10.0.0.2", False),
        (EXPOSED, "a" * 300, "10.0.0.2", False),
        ({**EXPOSED, "rendezvous_hosts": ("10.0.0.0/8",)}, "10.9.9.9", "192.0.2.1", True),
        ({**EXPOSED, "rendezvous_hosts": ("10.0.0.0/8",)}, "11.0.0.1", "192.0.2.1", False),
        ({**EXPOSED, "rendezvous_hosts": ("10.0.0.9",)}, "10.0.0.9", "192.0.2.1", True),
        ({**EXPOSED, "rendezvous_hosts": ("Trainer-0",)}, "trainer-0", "192.0.2.1", True),
        ({"rendezvous_hosts": ("10.0.0.9",)}, "192.0.2.7", CALLER, False),
    ],
)
def test_where_the_engine_may_meet(
    options: dict[str, Any], address: str, caller: str, opens: bool
) -> None:
    async def test() -> None:
        found = access(**options)
        if opens:
            await found.checked_join(join(address), caller)
            return
        with pytest.raises(Forbidden, match="--rendezvous-host") as caught:
            await found.checked_join(join(address), caller)
        assert caught.value.field == "address"

    run(test)


def unique_id(address: bytes, *, family: int, at: int) -> bytes:
    """An id as NCCL makes it, for rank 0 at `address`."""
    handle = bytearray(128)
    handle[8:10] = family.to_bytes(2, sys.byteorder)
    handle[at : at + len(address)] = address
    return bytes(handle)


@pytest.mark.parametrize(
    "given,opens",
    [
        (unique_id(bytes([10, 0, 0, 2]), family=socket.AF_INET, at=12), True),
        (unique_id(bytes([10, 0, 0, 3]), family=socket.AF_INET, at=12), False),
        (unique_id(bytes(10) + b"\xff\xff\x0a\0\0\2", family=socket.AF_INET6, at=16), True),
        (unique_id(bytes(15) + b"\1", family=socket.AF_INET6, at=16), False),
        (unique_id(b"", family=77, at=12), False),
        (b"short", False),
        (unique_id(b"", family=socket.AF_INET, at=12)[:14], False),
    ],
)
def test_the_address_within_an_nccl_id_counts_too(given: bytes, opens: bool) -> None:
    async def test() -> None:
        command = replace(join("10.0.0.2"), unique_id=given)
        if opens:
            await access(**EXPOSED).checked_join(command, "10.0.0.2")
            return
        with pytest.raises(Forbidden, match="--rendezvous-host"):
            await access(**EXPOSED).checked_join(command, "10.0.0.2")

    run(test)


@pytest.mark.parametrize(
    "path,wrap",
    [
        ("/init_weights_update_group", lambda body: body),
        ("/init_weight_transfer_engine", lambda body: {"init_info": body}),
        ("/command", lambda body: {"type": "join_group", "name": "g", **body}),
    ],
)
def test_every_route_that_joins_is_held_to_the_addresses(path: str, wrap: Any) -> None:
    async def test() -> None:
        async with serving(**EXPOSED) as server:
            body: dict[str, Any] = {"rank_offset": 1, "world_size": 2}
            if path == "/command":
                body |= {"address": "192.0.2.1", "port": 5}
            else:
                body |= {"master_address": "192.0.2.1", "master_port": 5}
            reply = await server.post(path, wrap(body), headers=ADMIN)
            assert reply.status_code in (400, 403)
            assert "--rendezvous-host" in reply.text
            assert server.commands() == []

    run(test)


def test_the_engine_meets_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [["10.0.0.5", "10.0.0.6"], ["169.254.169.254"]]

    async def addresses(host: str) -> list[str]:
        return found.pop(0) if host == "rebinds" else [host]

    monkeypatch.setattr("rollout.http.edge.access._addresses", addresses)

    async def test() -> None:
        options = {**EXPOSED, "rendezvous_hosts": ("10.0.0.0/8", "trainer-0")}
        checked = await access(**options).checked_join(join("rebinds"), CALLER)
        assert checked == replace(join("rebinds"), address="10.0.0.5")
        with pytest.raises(Forbidden):
            await access(**options).checked_join(join("rebinds"), CALLER)
        assert await access(**options).checked_join(join("trainer-0"), CALLER) == join("trainer-0")

    run(test)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/command", {"type": "join_group", "name": "g", "address": "rebinds", "port": 1}),
        ("/init_weights_update_group", {"master_address": "rebinds", "master_port": 1}),
        ("/init_weight_transfer_engine", {"master_address": "rebinds", "master_port": 1}),
    ],
)
def test_every_route_sends_the_checked_address(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def addresses(_: str) -> list[str]:
        return ["10.0.0.5"]

    monkeypatch.setattr("rollout.http.edge.access._addresses", addresses)
    body = {**body, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    if "transfer" in path:
        body = {"init_info": body}

    async def test() -> None:
        async with serving(rendezvous_hosts=("10.0.0.0/8",)) as server:
            await server.post(path, body)
            (command,) = server.commands()
            assert isinstance(command, JoinGroup)
            assert command.address == "10.0.0.5"

    run(test)

"""Registration in the words of sglang-router, old and new, and how workers come and go."""

import asyncio

import httpx

from tests.helpers.routers import FakeWorker, Line, Seen, routing, run

REFUSED = 400


async def members(http: httpx.AsyncClient) -> dict[str, dict[str, object]]:
    found = (await http.get("/workers")).json()
    return {worker["url"]: worker for worker in found["workers"]}


def test_a_worker_registers_by_the_json_api() -> None:
    async def test() -> None:
        worker = FakeWorker()
        await worker.start()
        async with routing() as routed:
            body = {"url": worker.url, "worker_type": "regular", "bootstrap_port": None}
            reply = await routed.http.post("/workers", json=body)
            assert reply.status_code == 202
            told = reply.json()
            assert told["status"] == "accepted"
            assert told["location"] == f"/workers/{told['worker_id']}"
            await routed.until_ready(1)
            found = (await routed.http.get("/workers")).json()
            assert found["total"] == 1
            assert found["stats"]["healthy_workers"] == 1
            assert found["stats"]["by_type"] == {"regular": 1, "prefill": 0, "decode": 0}
            (one,) = found["workers"]
            assert (one["id"], one["url"]) == (told["worker_id"], worker.url)
            assert (one["model_id"], one["worker_type"]) == ("fake", "regular")
            assert one["is_healthy"] is True
            assert (await routed.http.get(told["location"])).json() == one
        await worker.stop()

    run(test)


def test_a_worker_registers_by_the_older_calls() -> None:
    async def test() -> None:
        worker = FakeWorker()
        await worker.start()
        async with routing() as routed:
            reply = await routed.http.post(f"/add_worker?url={worker.url}")
            assert reply.status_code == 200
            await routed.until_ready(1)
            assert (await routed.http.get("/list_workers")).json() == {"urls": [worker.url]}
            await routed.http.post("/remove_worker", json={"url": worker.url})
            assert (await routed.http.get("/list_workers")).json() == {"urls": []}
        await worker.stop()

    run(test)


def test_registering_again_and_again_leaves_one_member() -> None:
    async def test() -> None:
        worker = FakeWorker()
        async with routing(worker) as routed:
            for _ in range(50):
                reply = await routed.http.post("/workers", json={"url": worker.url + "/"})
                assert reply.status_code == 202
            await routed.until_ready(1)
            assert len(await members(routed.http)) == 1

    run(test)


def test_a_worker_that_is_removed_ends_what_it_has() -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def held(seen: Seen, line: Line) -> None:
            await release.wait()
            line.reply(b"{}")

        worker = FakeWorker(held)
        async with routing(worker) as routed:
            post = routed.http.post("/generate", json={"text": "a"})
            waiting = asyncio.create_task(post)
            await routed.until(lambda: worker.seen)
            (name,) = [one["id"] for one in (await members(routed.http)).values()]
            assert (await routed.http.delete(f"/workers/{name}")).status_code == 202
            refused = await routed.http.post("/generate", json={"text": "b"})
            assert refused.status_code == 503
            assert "drains" in refused.json()["error"]["message"]
            release.set()
            assert (await waiting).status_code == 200
            routed.router.tick(0.0)
            assert len(routed.router.fleet) == 0

    run(test)


def test_what_is_no_worker_is_refused_by_its_field() -> None:
    async def test() -> None:
        async with routing() as routed:
            for body, field in (
                ({"url": "ftp://x"}, "url"),
                ({"url": "http://a b"}, "url"),
                ({}, "url"),
                ({"url": "http://h:1", "worker_type": "prefill"}, "worker_type"),
            ):
                reply = await routed.http.post("/workers", json=body)
                assert reply.status_code == REFUSED
                assert field in reply.json()["error"]["field"] + reply.json()["error"]["message"]
            assert (await routed.http.get("/workers/none")).status_code == 404
            assert (await routed.http.post("/add_worker", json={})).status_code == REFUSED
            assert len(routed.router.fleet) == 0

    run(test)


def test_a_worker_of_another_model_stays_out_by_name() -> None:
    async def test() -> None:
        first, other = FakeWorker(), FakeWorker(model="other")
        async with routing(first) as routed:
            await other.start()
            await routed.http.post("/workers", json={"url": other.url})
            await routed.until(lambda: all(worker.joined for worker in routed.router.fleet))
            found = await members(routed.http)
            assert found[first.url]["is_healthy"] is True
            assert found[other.url]["is_healthy"] is False
            assert "'other'" in str(found[other.url]["metadata"])
            await other.stop()

    run(test)


def test_a_worker_may_register_before_it_answers() -> None:
    async def test() -> None:
        worker = FakeWorker()
        await worker.start()
        await worker.stop()
        async with routing() as routed:
            await routed.http.post("/workers", json={"url": worker.url})
            assert (await members(routed.http))[worker.url]["is_healthy"] is False
            await worker.start(worker.port)
            await routed.until_ready(1)
        await worker.stop()

    run(test)


def test_the_first_worker_of_an_empty_fleet_says_which_model_it_has() -> None:
    async def test() -> None:
        mistaken, right = FakeWorker(model="other"), FakeWorker()
        async with routing(mistaken) as routed:
            await right.start()
            assert (await routed.http.delete(f"/workers/{mistaken.url}")).status_code == 202
            await routed.http.post("/workers", json={"url": right.url})
            await routed.until_ready(1)
            await right.stop()

    run(test)


def test_a_path_before_a_workers_routes_keeps_its_case() -> None:
    async def test() -> None:
        async with routing() as routed:
            body = {"url": "HTTP://Host:1/Path/"}
            reply = await routed.http.post("/workers", json=body)
            assert reply.status_code == REFUSED
            reply = await routed.http.post("/workers", json={"url": "http://Host:1/Path/"})
            assert reply.json()["url"] == "http://host:1/Path"

    run(test)

"""What the owner of an engine tells its fronts, and when they see it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rollout.http.fronts.news import News, NewsReader, NewsWriter, ToldLabels
from rollout.http.fronts.publisher import Publisher
from rollout.http.services import Services, make_services
from tests.helpers.http_app import Server, run, serving, until


def services_of(server: Server) -> Services:
    from engine.config import EngineConfig
    from rollout.http.config import ServeConfig

    return make_services(ServeConfig(engine=EngineConfig(model="fake")), server.engine, None)


def test_a_reader_sees_what_was_written_last(tmp_path: Path) -> None:
    writer = NewsWriter(tmp_path)
    reader = NewsReader(writer.path)
    assert reader.news == News()
    for number in range(3):
        writer.write(News(hub=f"ipc://{number}", labels={number: "x"}))
        assert (reader.news.hub, reader.news.labels) == (f"ipc://{number}", {number: "x"})
    assert NewsReader(writer.path).news == reader.news
    # Nothing new is read once.
    assert reader.news is reader.news


def test_a_front_calls_a_version_as_its_owner_does(tmp_path: Path) -> None:
    writer = NewsWriter(tmp_path)
    labels = ToldLabels(NewsReader(writer.path))
    told = {"weight_version": "7", "weight_versions": [{"version": "7", "start": 0, "end": 2}]}
    labels.relabel(told)
    assert (labels.text(7), told["weight_version"]) == ("7", "7")
    writer.write(News(labels={7: "step-7"}))
    labels.relabel(told)
    assert (labels.text(7), labels.text(8)) == ("step-7", "8")
    assert told["weight_versions"] == [{"version": "step-7", "start": 0, "end": 2}]


def test_what_is_held_named_or_gone_is_told_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving() as server:
            services = services_of(server)
            writer = NewsWriter(tmp_path)
            Publisher(writer, services, lambda: "ipc://here")
            reader = NewsReader(writer.path)
            assert (reader.news.hub, reader.news.holds) == ("ipc://here", False)
            server.engine.outbox.hold()
            assert reader.news.holds
            server.engine.outbox.release()
            assert not reader.news.holds
            services.labels.name(3, "three")
            assert reader.news.labels == {3: "three"}
            server.link.die()
            assert reader.news.hub == ""
            assert "was killed by signal 9" in reader.news.dead

    run(test)


def test_whatever_else_changes_is_told_within_a_moment(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving() as server:
            writer = NewsWriter(tmp_path)
            publisher = Publisher(writer, services_of(server), lambda: "ipc://here")
            telling = asyncio.create_task(publisher.run())
            reader = NewsReader(writer.path)
            server.link.die()
            server.engine.explain("it is being started again")
            await until(lambda: reader.news.dead == "it is being started again")
            telling.cancel()

    run(test)

"""What the owner of an engine tells its fronts, which read it whenever they need to know.

A file that is replaced as a whole, and a counter in memory that all processes map, so that nothing
has changed costs one load to see. Whoever reads after an effect of what was written sees at least
that: a version has its label before its first token can come.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from rollout.http.updates.version_labels import VersionLabels


class News(msgspec.Struct, frozen=True, kw_only=True):
    """State of the server as a whole.

    hub: where the engine that runs is joined, "" while none does. dead: why calls are refused
    then, and the field of that error. holds: requests are held back, so those that come go to
    the owner. labels: what versions of the weights are called, beside their numbers.
    """

    hub: str = ""
    dead: str = ""
    dead_field: str = "leader"
    holds: bool = False
    labels: dict[int, str] = {}


class NewsWriter:
    """The owner's end. folder: of this server alone; the file is there once this returns."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "news"
        self._counter = _counter(self.path, create=True)
        self._last: News | None = None
        self.write(News())

    def write(self, news: News) -> None:
        """Tell `news` from now on."""
        if news == self._last:
            return
        self._last = news
        written = self.path.with_suffix(".next")
        written.write_bytes(msgspec.msgpack.encode(news))
        os.replace(written, self.path)
        self._counter[0] += 1


class NewsReader:
    """A front's end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counter = _counter(path, create=False)
        self._seen = -1
        self._news = News()

    @property
    def news(self) -> News:
        """The latest."""
        count = self._counter[0]
        if count != self._seen:
            self._news = msgspec.msgpack.decode(self._path.read_bytes(), type=News)
            self._seen = count
        return self._news


class ToldLabels(VersionLabels):
    """The labels that the owner gave, as a front reads them."""

    def __init__(self, reader: NewsReader) -> None:
        super().__init__()
        self._reader = reader

    @property
    def labels(self) -> Mapping[int, str]:
        """By version; those that are called by their number are not among them."""
        return self._reader.news.labels


def _counter(path: Path, *, create: bool) -> memoryview:
    """One number of 64 bits beside the file, which is stored and loaded as a whole."""
    place = path.with_suffix(".count")
    if create:
        place.write_bytes(bytes(8))
    with place.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")

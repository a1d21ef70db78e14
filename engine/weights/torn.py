"""Which weights may be a mixture of two versions, and why the rank therefore refuses to step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


class TornWeights:
    """Names of tensors that were touched and not committed, by the version that touched them.

    refusal: why no step may run, or "". Read at every step, from any thread.
    """

    def __init__(self) -> None:
        self.refusal = ""
        self._versions: dict[str, int] = {}
        self._named: int | None = None
        self._before: tuple[dict[str, int], str] = ({}, "")

    @property
    def versions(self) -> Mapping[str, int]:
        """The version of the update that touched each torn tensor."""
        return self._versions

    def remember(self) -> None:
        """Note how things stand before an update."""
        self._before = (dict(self._versions), self.refusal)

    def tear(self, names: Iterable[str], version: int, reason: str = "") -> None:
        """An update is about to write the weights `names`; without any, nothing is torn.

        reason: replaces the usual one.
        """
        fresh = dict.fromkeys(names, version)
        if not fresh:
            return
        self._versions.update(fresh)
        # Named once an update and not once a tensor: thousands may come one by one.
        if reason or self._named != version:
            self._named = version
            self.refusal = reason or _half_written(version, sorted(self._versions))

    def tear_all(self, names: Iterable[str], version: int, reason: str) -> None:
        """The weights `names` are gone, for a reason of its own."""
        self._versions, self._named = dict.fromkeys(names, version), None
        self.refusal = reason

    def restored(self) -> None:
        """What the update touched is as `remember` found it."""
        versions, self.refusal = self._before
        self._versions, self._named = dict(versions), None

    def mend(self) -> None:
        """A committed update covered everything."""
        self._versions, self._named, self.refusal = {}, None, ""


def and_more(names: Sequence[str]) -> str:
    """'a and 3 more'."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _half_written(version: int, names: Sequence[str]) -> str:
    return (
        f"the update to version {version} is written in place and not committed: "
        f"{and_more(names)} may be a mixture. Commit it, or publish a whole version, to serve "
        "again"
    )

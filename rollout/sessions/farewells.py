"""Why what is gone is gone, for those who still name it."""

from __future__ import annotations

_MOST = 4096


class Farewells:
    """Reasons by id, the last few thousand."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def note(self, name: str, why: str) -> None:
        """Remember why `name` is gone."""
        self._reasons[name] = why
        if len(self._reasons) > _MOST:
            del self._reasons[next(iter(self._reasons))]

    def why(self, name: str) -> str:
        """The reason, "" if none is known."""
        return self._reasons.get(name, "")

    def forget(self, name: str) -> None:
        """`name` is in use again."""
        self._reasons.pop(name, None)

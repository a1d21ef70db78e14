"""The figures of an evaluation, as people read them.

Figures keep their names in files. Shown, the accuracy of the sets that are `rewarded`, by name, is
called a reward: what graded them has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from rich.table import Table

Figures = Mapping[str, float]


def by_set(figures: Figures) -> dict[str, dict[str, float]]:
    """The figures `eval/<set>/<figure>` of `Evaluation.measure`, by set and figure."""
    sets: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        _, name, figure = [*key.split("/", 2), ""][:3]
        if figure:
            sets.setdefault(name, {})[figure] = value
    return sets


def tell(figures: Figures, rewarded: Collection[str] = ()) -> list[str]:
    """A line a set."""
    lines = []
    for name, mine in _named(by_set(figures), rewarded).items():
        shown = [figure for figure in _titles(mine) if figure != "num_failed" or mine[figure]]
        lines.append(f"{name}: " + ", ".join(f"{f} {_cell(mine, f)}" for f in shown))
    return lines


def table(sets: Mapping[str, Figures], rewarded: Collection[str] = ()) -> Table:
    """A row a set; a figure and its standard error in one cell."""
    sets = _named(sets, rewarded)
    titles = list(dict.fromkeys(title for mine in sets.values() for title in _titles(mine)))
    shown = Table("set", box=None)
    for title in titles:
        shown.add_column(title, justify="right")
    for name, mine in sets.items():
        shown.add_row(name, *(_cell(mine, title) for title in titles))
    return shown


def _named(sets: Mapping[str, Figures], rewarded: Collection[str]) -> Mapping[str, Figures]:
    """The sets with the accuracy of some called a reward."""
    return {
        name: {key.replace("accuracy", "reward"): mine[key] for key in mine}
        if name in rewarded
        else mine
        for name, mine in sets.items()
    }


def _titles(mine: Figures) -> list[str]:
    return [figure for figure in mine if not figure.endswith("/stderr")]


def _cell(mine: Figures, figure: str) -> str:
    if figure not in mine:
        return "-"
    if figure.startswith("num_"):
        return f"{mine[figure]:.0f}"
    error = mine.get(f"{figure}/stderr")
    return f"{mine[figure]:.3f}" + ("" if error is None else f" ± {error:.3f}")

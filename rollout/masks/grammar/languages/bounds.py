"""How much a grammar may ask for: of whoever reads it, of its compilation, and of every mask.

`translate` checks the shape of a source before llguidance reads it, since its readers recurse.
What no shape shows (a short regular expression of very many states) llguidance counts itself, in
steps of its own and not in seconds, so that the same grammars are refused on every machine.
"""

from __future__ import annotations

from typing import NoReturn

from llguidance import LLParserLimits

from engine.errors import InvalidRequest

MAX_DEPTH = 64
"""Most objects and lists, or groups of a regular expression, inside each other."""

MAX_CHOICES = 10_000
"""Most texts of a choice."""

MAX_TAGS = 128
"""Most tags of a structural tag."""

_LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    # A state takes up to 2 kB, and every grammar in memory may have that many.
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    # Errors go to the caller, who knows the grammar.
    "verbose_errors": False,
}


def parser_limits() -> LLParserLimits:
    """What llguidance may spend on one grammar; the meaning of each is in its documentation."""
    return LLParserLimits(**_LIMITS)


def refuse(problem: str) -> NoReturn:
    """Raise the error of a source that is no grammar, or none that is served. Its field is
    `grammar`; whoever knows by which field of which dialect it came gives it that name."""
    raise InvalidRequest(f"grammar: {problem}", field="grammar")

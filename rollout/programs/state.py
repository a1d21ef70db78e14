"""What a program writes on: its text so far, and the variables that were generated in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import msgspec

from engine.errors import InvalidRequest
from engine.protocol import GenerateRequest, Grammar
from rollout.programs.backends.base import Session
from rollout.programs.constraints import grammar_of_words, texts_of, value_of
from rollout.programs.context import Context
from rollout.programs.conversation import Conversation
from rollout.programs.errors import naming
from rollout.programs.forks import Forks
from rollout.programs.generated import Generated, Selected, Variable, read_reply
from rollout.programs.sampling_words import sampling_of_words
from rollout.programs.scoring import Normalise, likeliest, score
from rollout.programs.tools import Tool
from rollout.requests.message_ranges import check_ranges
from rollout.requests.seeds import derive_seed
from rollout.text.tokenizer import Tokenizer


class State:
    """One thread of a program. Text and turns are added at its end; `gen` and `select` have the
    model go on, and keep what came as a variable (`state["name"]`); `fork` makes states that go on
    from here separately.

    One step runs at a time: what is to run beside another is a fork. A step that fails leaves the
    state as it was. Seeds of requests are derived from the state's own and their number in it.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer, context: Context, seed: int, where: str
    ) -> None:
        """where: which branch of which program this is, for errors."""
        self.tokenizer = tokenizer
        self._session = session
        self._context = context
        self._seed = seed
        self._where = where
        self._variables: dict[str, Variable] = {}
        self._num_drawn = 0
        self._num_forks = 0
        self._running = ""

    def __getitem__(self, name: str) -> Variable:
        found = self._variables.get(name)
        if found is None:
            known = ", ".join(self._variables) or "none yet"
            raise InvalidRequest(
                f"{self._where} has no variable {name!r}; there are: {known}", field=name
            )
        return found

    @property
    def variables(self) -> Mapping[str, Variable]:
        """All that was generated, by name; of two of a name the later."""
        return dict(self._variables)

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far."""
        return list(self._context.ids())

    @property
    def text(self) -> str:
        """What the tokens say, special ones included."""
        return self._context.text()

    def add(self, *pieces: str | Variable) -> None:
        """Add texts, and variables by their tokens; to a conversation, within `reply`."""
        self._settled("add")
        for piece in pieces:
            if isinstance(piece, str):
                self._context.add_text(piece)
            elif isinstance(piece, Generated | Selected):
                self._context.add_variable(piece)
            else:
                raise InvalidRequest(
                    f"add takes texts and variables of a state, not {repr(piece)[:100]}",
                    field="add",
                )

    def system(self, content: str) -> None:
        """A turn of the system."""
        self.turn("system", content)

    def user(self, content: str) -> None:
        """A turn of the user."""
        self.turn("user", content)

    def assistant(self, content: str) -> None:
        """A turn of the assistant that is given, such as an example."""
        self.turn("assistant", content)

    def turn(self, role: str, content: str, **fields: Any) -> None:
        """A turn of any role that the chat template knows; fields: more of the message."""
        self._settled(role)
        self._context.add_turn(role, content, **fields)

    @property
    def turns(self) -> Conversation:
        """The turns so far, and how replies to them are written."""
        return self._context.turns

    def use_tools(self, tools: Sequence[Tool]) -> None:
        """Tell the model of functions, at the beginning of a conversation; `answer` calls them."""
        self._settled("tools")
        self._context.turns.offer([tool.told for tool in tools])

    @contextmanager
    def reply(self) -> Iterator[None]:
        """An assistant's turn in several pieces: `add`, `gen` and `select` within make one turn.
        What raises within leaves the state as before. Raises InvalidRequest (`reply`) where none
        may begin."""
        self._settled("reply")
        before = self._context.copied()
        if not self._context.begin_reply():
            raise InvalidRequest(
                "a reply follows turns: begin with system or user, and end the reply before it",
                field="reply",
            )
        try:
            yield
            self._context.end_reply()
        except BaseException:
            self._context = before
            raise

    async def gen(
        self,
        name: str,
        *,
        seed: int | None = None,
        regex: str | None = None,
        json_schema: Mapping[str, Any] | str | None = None,
        ebnf: str | None = None,
        choices: Sequence[str] | None = None,
        returns: Any = None,
        grammar: Grammar | None = None,
        **sampling: Any,
    ) -> Generated:
        """Have the model go on, and keep what came as the variable `name`.

        In a conversation it is the assistant's next turn, or a piece of the one that `reply`
        opened. seed: the request's `sampling_seed`; else one of its own. sampling: fields of
        `SamplingParams`, such as `max_new_tokens` and `stop`; the state goes on from the text
        before a stop. At most one of the others: what the text has to be
        (docs/structured_output.md). returns: a type, one of which the variable's `value` is.

        Raises the typed error of a request that is refused or fails, `name` before its field.
        """
        with self._step(name) as context, naming(name):
            held = grammar_of_words(
                regex=regex,
                json_schema=json_schema,
                ebnf=ebnf,
                choices=choices,
                returns=returns,
                grammar=grammar,
            )
            drawn = self._next_seed() if seed is None else seed
            params = msgspec.structs.replace(sampling_of_words(sampling), sampling_seed=drawn)
            # Whoever read the words has not seen the seed.
            check_ranges(params)
            wire = GenerateRequest(
                input_ids=_begun(context),
                sampling_params=params,
                grammar=held,
                return_logprob=True,
            )
            found = read_reply(name, wire, await self._session.generate(wire))
            if returns is not None:
                found = replace(found, value=value_of(found.text, returns, "value"))
            context.add_variable(found)
        self._variables[name] = found
        return found

    async def select(
        self, name: str, choices: Sequence[str], *, normalise: Normalise = "none"
    ) -> Selected:
        """Go on with the likeliest of some texts, and keep it as the variable `name`.

        Compared are the logprobs of the choices' tokens given all that came before, at temperature
        1 (`rollout/programs/scoring.py`). normalise: "tokens" compares the mean of a token, for
        texts of which one begins with another or is much longer. Raises as `gen`.
        """
        with self._step(name) as context, naming(name):
            texts = texts_of(choices)
            scores = await score(self._session, self.tokenizer, _begun(context), texts)
            found = likeliest(name, texts, scores, normalise)
            context.add_variable(found)
        self._variables[name] = found
        return found

    def fork(self, count: int) -> Forks[Self]:
        """`count` states that go on from here, each with seeds of its own and a copy of the
        variables. What is not encoded yet is encoded now, once."""
        self._settled("fork")
        if not isinstance(count, int) or count < 1:
            raise InvalidRequest(
                f"fork makes {count!r} branches; give a count, at least 1", field="fork"
            )
        self._context.ids()
        number, self._num_forks = self._num_forks, self._num_forks + 1
        branches = [self._branch(derive_seed(self._seed, "fork", number, i)) for i in range(count)]
        return Forks(branches, f"fork {number} of {self._where}")

    def join(self, branch: Self) -> None:
        """Go on as one of the branches: with its tokens, all of which are behind those of this
        state, and its variables. Raises InvalidRequest (`branch`) for a state that does not begin
        with this one."""
        self._settled("join")
        branch._settled("join")
        mine, theirs = self._context.ids(), branch._context.ids()
        if theirs[: len(mine)] != mine:
            raise InvalidRequest(
                "the branch does not begin with this state; it was forked from another, or before "
                "this one went on",
                field="branch",
            )
        self._context = branch._context.copied()
        self._variables = {**self._variables, **branch._variables}

    def _branch(self, seed: int) -> Self:
        where = f"a branch of {self._where}"
        other = type(self)(self._session, self.tokenizer, self._context.copied(), seed, where)
        other._variables = dict(self._variables)
        return other

    @contextmanager
    def _step(self, name: str) -> Iterator[Context]:
        """The context that a step goes on from and adds to; kept if the step does not fail."""
        self._settled(name)
        context, self._running = self._context.copied(), name
        try:
            with naming(name):
                opened = context.begin_reply()
            yield context
            if opened:
                context.end_reply()
            self._context = context
        finally:
            self._running = ""

    def _settled(self, name: str) -> None:
        if self._running:
            raise InvalidRequest(
                f"{name}: {self._where} is still generating {self._running!r}; fork the state for "
                "what is to run beside it",
                field=name,
            )

    def _next_seed(self) -> int:
        number, self._num_drawn = self._num_drawn, self._num_drawn + 1
        return derive_seed(self._seed, "draw", number)


def _begun(context: Context) -> list[int]:
    ids = context.ids()
    if not ids:
        raise InvalidRequest(
            "there is nothing to go on from; add text or a turn", field="input_ids"
        )
    return ids

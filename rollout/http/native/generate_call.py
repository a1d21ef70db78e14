"""The body of POST /generate: one native object, or a batch in the lists of its fields."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Raw

from engine.errors import ContextTooLong, InvalidRequest
from engine.protocol import GenerateRequest, Pooling, ReplicaState, Task
from rollout.http.native.long_prompts import check_long_prompt
from rollout.requests.expand import check_count
from rollout.requests.json_types import decode_json
from rollout.requests.sample_ids import check_client_id, fresh_id
from rollout.requests.wire import Fields, meaningful_fields, parse_fields
from rollout.text.tokenizer import Tokenizer

# A list here is a list an item; in `text` and `input_ids` it decides that there are items.
_PER_ITEM = frozenset(GenerateRequest.__struct_fields__) - {"text", "input_ids", "stream"}
# Fields whose one value is a list of numbers, which stands for every item.
_LISTS = frozenset({"token_ids_logprob", "allowed_token_ids"})


class GenerateCall(msgspec.Struct, frozen=True, kw_only=True):
    """One POST. prefix: what every id of the call begins with, if the server made them. task,
    pooling: what is done to each item, as in `Request`. decoded: the items were decoded as they
    are, so that their ranges need no second look."""

    items: list[GenerateRequest]
    batch: bool
    stream: bool
    prefix: str = ""
    task: Task = "generate"
    pooling: Pooling = "last"
    decoded: bool = False


class PromptRoom(msgspec.Struct, frozen=True, kw_only=True):
    """What a body may bring at most, looked at before it is decoded. text_bytes: of the longest
    text that tokens of the context can hold. num_ids: of a prompt. num_items: of a batch."""

    text_bytes: int
    num_ids: int
    num_items: int


def prompt_room(state: ReplicaState, tokenizer: Tokenizer | None) -> PromptRoom:
    """The room that an engine has."""
    longest = 0 if tokenizer is None else tokenizer.longest_token_bytes
    return PromptRoom(
        text_bytes=state.context_length * longest,
        num_ids=state.context_length,
        num_items=state.max_waiting,
    )


DrawId = Callable[[], str]


def parse_call(
    body: bytes, room: PromptRoom | None = None, draw_id: DrawId = fresh_id
) -> GenerateCall:
    """Read a body of the native dialect, the fields of `GenerateRequest`. draw_id: the id of a call
    that brings none.

    Fields that the dialect has and this engine does not serve pass while they ask for nothing
    (null, false, empty), since clients send their defaults. Raises InvalidRequest naming the
    field, and the item for a batch.
    """
    plain = _plain(body, room)
    if plain is not None:
        return _alone(plain, draw_id)
    if room is not None:
        check_long_prompt(body, text_bytes=room.text_bytes, num_ids=room.num_ids)
    fields = meaningful_fields(decode_json(body, Fields))
    for name in ("text", "input_ids"):
        if room is not None and name in fields:
            check_prompt(fields[name], room, name)
    if room is not None and "output_ids" in fields:
        _check_given(fields["output_ids"], room)
    prompts = _prompts(fields)
    if prompts is None:
        return _alone(parse_fields(fields), draw_id)
    name, values = prompts
    if room is not None:
        _check_prompts(values, room, name)
    rest = {k: v for k, v in fields.items() if k != name}
    return _parse_batch(rest, name, values, draw_id)


def _plain(body: bytes, room: PromptRoom | None) -> GenerateRequest | None:
    """The request of a short body that has one prompt and no field but ours, as most have, decoded
    at once. None for any other, which is to be looked at part by part."""
    if b"null" in body or (room is not None and len(body) > 2 * min(room.num_ids, room.num_items)):
        return None
    try:
        return msgspec.json.decode(body, type=GenerateRequest)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _alone(wire: GenerateRequest, draw_id: DrawId) -> GenerateCall:
    check_client_id(wire.rid, "rid")
    wire, prefix = _with_rid(wire, draw_id)
    return GenerateCall(items=[wire], batch=False, stream=wire.stream, prefix=prefix, decoded=True)


def _check_given(raw: Raw, room: PromptRoom) -> None:
    """As `check_prompt`, for output tokens: one list, a list for each sample, and either for each
    prompt of a batch."""
    if not _is_list(raw, inner=True):
        check_prompt(raw, room, "output_ids")
        return
    most = 1 + 2 * room.num_items
    if len(raw) > most and (num_lists := bytes(raw).count(b"[")) > most:
        raise InvalidRequest(
            f"output_ids has {num_lists} lists; a call has at most {room.num_items} samples",
            field="output_ids",
        )


def _check_prompts(values: list[Raw], room: PromptRoom, name: str) -> None:
    for index, value in enumerate(values):
        try:
            check_prompt(value, room, name)
        except InvalidRequest as error:
            raise in_item(error, index) from error


def _parse_batch(fields: Fields, name: str, values: list[Raw], draw_id: DrawId) -> GenerateCall:
    if not values:
        raise InvalidRequest(f"{name} is an empty batch; send at least one prompt", field=name)
    lists = _lists(fields, len(values))
    prefix = "" if "rid" in fields else f"{draw_id()}-"
    common = {key: value for key, value in fields.items() if key not in lists}
    if "rid" in common:
        raise InvalidRequest("rid must be a list with one id an item in a batch", field="rid")
    shared = _shared_lists(common)
    items = []
    for index, value in enumerate(values):
        own = {key: column[index] for key, column in lists.items()}
        item = meaningful_fields({**common, **own, name: value})
        if prefix:
            item["rid"] = Raw(f'"{prefix}{index}"'.encode())
        items.append(msgspec.structs.replace(_parse_item(item, index), **shared))
    return GenerateCall(items=items, batch=True, stream=items[0].stream, prefix=prefix)


def _shared_lists(common: Fields) -> dict[str, list[int] | None]:
    """Takes the lists of numbers that stand for every item out of `common`. Decoded once, they are
    the same object in all items, however many there are."""
    found = {name: common.pop(name) for name in sorted(_LISTS & common.keys())}
    if not found:
        return {}
    wire = _parse_item(found, 0)
    return {name: getattr(wire, name) for name in found}


def _parse_item(item: Fields, index: int) -> GenerateRequest:
    try:
        found = parse_fields(item)
        check_client_id(found.rid, "rid")
        return found
    except InvalidRequest as error:
        raise in_item(error, index) from error


def in_item(error: InvalidRequest, index: int) -> InvalidRequest:
    """The error as one of item `index` of a batch."""
    return type(error)(f"item {index}: {error.message}", field=f"[{index}].{error.field}")


def num_sequences(call: GenerateCall, state: ReplicaState) -> int:
    """How many sequences a call asks for. Raises InvalidRequest (`n`), naming the item of a batch,
    for more samples of a prompt than there may be: room must not be kept for what is refused."""
    for number, item in enumerate(call.items):
        try:
            check_count(item.sampling_params.n, state)
        except InvalidRequest as error:
            if not call.batch:
                raise
            raise in_item(error, number) from error
    return sum(item.sampling_params.n for item in call.items)


def check_prompt(raw: Raw, room: PromptRoom, field: str) -> None:
    """Refuse a text, a list of ids, or a batch of either that is too long however it is decoded,
    before there is an object for every part of it.

    Raises ContextTooLong for a prompt, InvalidRequest for a batch that could not wait together.
    """
    if len(raw) <= 2 * min(room.num_ids, room.num_items):
        return
    start = bytes(memoryview(raw)[:64]).lstrip()
    inner = start[1:].lstrip()[:1]
    if start.startswith(b'"'):
        # A byte of text is at most six of JSON.
        if room.text_bytes and len(raw) > 6 * room.text_bytes + 2:
            raise ContextTooLong(
                f"{field} has {len(raw)} bytes, more than {room.num_ids} tokens can hold; "
                "shorten it",
                field=field,
            )
    elif inner in (b"[", b'"'):
        _check_items(bytes(raw), inner, room, field)
    elif start.startswith(b"[") and (num_ids := bytes(raw).count(b",") + 1) > room.num_ids:
        raise ContextTooLong(
            f"{field} has {num_ids} tokens, too many for a context of {room.num_ids}; shorten it",
            field=field,
        )


def _check_items(data: bytes, inner: bytes, room: PromptRoom, field: str) -> None:
    # Quotes inside texts are escaped; every text has two of its own.
    quotes = data.count(b'"') - data.count(b'\\"')
    count = quotes // 2 if inner == b'"' else data.count(b"]") - 1
    if count > room.num_items:
        raise InvalidRequest(
            f"{field} has {count} prompts; send at most {room.num_items} at once", field=field
        )


def _prompts(fields: Fields) -> tuple[str, list[Raw]] | None:
    """Field and values of the items of a batch; None for a single prompt."""
    for name in ("text", "input_ids"):
        if _is_list(fields.get(name)) and (name == "text" or _is_list(fields[name], inner=True)):
            return name, decode_json(fields[name], list[Raw], field=name, what=name)
    return None


def _is_list(raw: Raw | None, *, inner: bool = False) -> bool:
    """Whether a value is a list, or with `inner` its first entry."""
    start = b"" if raw is None else bytes(memoryview(raw)[:64]).lstrip()
    return (start[1:].lstrip() if inner else start).startswith(b"[")


def _lists(shared: Fields, count: int) -> dict[str, list[Raw]]:
    """Fields of `shared` that have a value an item."""
    found = {}
    for name in _PER_ITEM & shared.keys():
        if bytes(shared[name])[:1] != b"[" or (name in _LISTS and _is_flat(shared[name])):
            continue
        found[name] = _column(shared[name], count, name)
    return found


def _column(raw: Raw, count: int, name: str) -> list[Raw]:
    """The `count` values of a list. A tuple's decoder stops at the first value too many, so that
    millions more cost nothing."""
    try:
        return list(msgspec.json.decode(raw, type=tuple[(Raw,) * count]))  # type: ignore[misc]
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"{name} has not {count} entries, one for each of {count} items", field=name
        ) from error


def _is_flat(value: Raw) -> bool:
    """Whether a list holds numbers, or nothing."""
    inner = bytes(memoryview(value)[:64])[1:].lstrip()[:1]
    return inner.isdigit() or inner in (b"-", b"]")


def _with_rid(wire: GenerateRequest, draw_id: DrawId) -> tuple[GenerateRequest, str]:
    if wire.rid is not None:
        return wire, ""
    rid = draw_id()
    return msgspec.structs.replace(wire, rid=rid), rid

"""Per-slot sampling state, and the edits of logits before a draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.batch import RequestTable
from engine.logit_edits import edit_logits, edit_of
from engine.protocol import NewRow, RowSampling
from engine.sampling import DrawOptions, Sampler

PLAIN = RowSampling(
    temperature=1.0,
    top_k=-1,
    top_p=1.0,
    min_p=0.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    repetition_penalty=1.0,
    logit_bias={},
    seed=1,
    min_new_tokens=0,
    banned_ids=[],
    top_logprobs=0,
)


def changed(**fields) -> RowSampling:
    values = {name: getattr(PLAIN, name) for name in PLAIN.__struct_fields__}
    return RowSampling(**{**values, **fields})


KNOWN = torch.tensor([3, 4, 4, 5, 4])  # two prompt tokens, then 4, 5, 4
PROMPT = 2


def edited(params: RowSampling, logits: list[float] | None = None) -> list[float]:
    values = torch.tensor(logits or [1.0] * 8)
    token_ids = KNOWN[:PROMPT].int().numpy()
    entering = NewRow(slot=0, token_ids=token_ids, prompt_len=PROMPT, sampling=params)
    edit = edit_of(entering, torch.device("cpu"))
    assert edit is not None
    edit_logits(values, KNOWN, edit)
    return values.tolist()


def test_frequency_counts_occurrences_in_the_output() -> None:
    assert edited(changed(frequency_penalty=0.5)) == [1, 1, 1, 1, 0, 0.5, 1, 1]


def test_presence_counts_once() -> None:
    assert edited(changed(presence_penalty=0.5)) == [1, 1, 1, 1, 0.5, 0.5, 1, 1]


def test_repetition_scales_by_sign_and_sees_the_prompt() -> None:
    logits = [1.0, 1, 1, 2, -2, 4, 1, 1]
    got = edited(changed(repetition_penalty=2.0), logits)
    assert got == [1, 1, 1, 1, -4, 2, 1, 1]


def test_bias_adds() -> None:
    assert edited(changed(logit_bias={0: -2.0, 7: 3.0})) == [-1, 1, 1, 1, 1, 1, 1, 4]


@pytest.mark.parametrize("minimum,banned", [(3, False), (4, True)])
def test_bans_hold_until_enough_tokens_were_produced(minimum: int, banned: bool) -> None:
    got = edited(changed(min_new_tokens=minimum, banned_ids=[6]))
    assert (got[6] == float("-inf")) is banned


class Batch:
    """The two vectors of a `StepBatch` that a draw reads."""

    def __init__(self, slots: list[int], lengths: list[int]) -> None:
        self.slots_S = torch.tensor(slots)
        self.kv_lens_S = torch.tensor(lengths)


def make(rows: list[NewRow]) -> tuple[Sampler, RequestTable]:
    device = torch.device("cpu")
    sampler = Sampler(num_slots=4, device=device, backend="torch")
    table = RequestTable(num_slots=4, context_length=16, page_size=4, device=device)
    table.enter(rows)
    sampler.enter(rows)
    return sampler, table


def row(slot: int, sampling: RowSampling, ids: list[int] | None = None) -> NewRow:
    token_ids = np.array(ids or [1, 2, 3], dtype=np.int32)
    return NewRow(slot=slot, token_ids=token_ids, prompt_len=len(token_ids), sampling=sampling)


def draw(sampler, table, slots, lengths, logits):
    return sampler.draw(logits.clone(), Batch(slots, lengths), np.array(slots), table)


def test_a_row_draws_the_same_alone_and_in_company() -> None:
    rows = [row(s, changed(seed=s + 5, top_k=s or -1, temperature=0.5 + s)) for s in range(3)]
    sampler, table = make(rows)
    logits = torch.randn(3, 100)
    together = draw(sampler, table, [0, 1, 2], [3, 3, 3], logits)
    for slot in range(3):
        alone = draw(sampler, table, [slot], [3], logits[slot : slot + 1])
        assert alone.token_S[0] == together.token_S[slot]
        assert alone.logprob_S[0] == pytest.approx(together.logprob_S[slot].item(), abs=1e-6)


def test_a_slot_forgets_its_former_tenant() -> None:
    sampler, table = make([row(0, changed(logit_bias={9: 100.0}, top_logprobs=3, entropy=True))])
    logits = torch.zeros(1, 16)
    drawn = draw(sampler, table, [0], [3], logits)
    assert drawn.token_S[0] == 9 and drawn.entropy_S is not None
    assert drawn.top is not None and drawn.top.ids.shape == (1, 3)
    sampler.enter([row(0, changed(temperature=0.0))])
    drawn = draw(sampler, table, [0], [3], logits)
    assert drawn.token_S[0] == 0 and drawn.top is None and drawn.entropy_S is None


def test_a_wide_answer_is_computed_for_the_rows_that_ask_alone() -> None:
    sampler, table = make([row(0, PLAIN), row(1, changed(top_logprobs=50)), row(2, PLAIN)])
    logits = torch.randn(3, 100)
    top = draw(sampler, table, [2, 1, 0], [3, 3, 3], logits).top
    assert top is not None and top.rows.tolist() == [1] and top.rows.dtype == np.int32
    assert top.ids.shape == top.logprobs.shape == (1, 50)
    assert top.ids[0, 0] == logits[1].argmax()


def test_named_tokens_come_behind_the_likeliest_of_their_row() -> None:
    asked = [
        PLAIN,
        changed(top_logprobs=2, logprob_ids=[7, 7, 0], temperature=0.5),
        changed(top_logprobs=6),
        changed(logprob_ids=[99], logit_bias={98: 3.0}),
    ]
    sampler, table = make([row(slot, sampling) for slot, sampling in enumerate(asked)])
    logits = torch.randn(4, 100)
    top = draw(sampler, table, [3, 2, 1, 0], [3] * 4, logits[[3, 2, 1, 0]]).top
    assert top is not None and top.rows.tolist() == [0, 1, 2]
    assert top.ids.shape == top.logprobs.shape == (3, 6)
    assert top.ids[0, :1].tolist() == [99]
    assert top.ids[1].tolist() == logits[2].topk(6).indices.tolist()
    assert top.ids[2, :5].tolist() == [*logits[1].topk(2).indices.tolist(), 7, 7, 0]
    logits[1] /= 0.5
    logits[3, 98] += 3.0
    want = logits.log_softmax(-1)
    for place, (slot, count) in enumerate(((3, 1), (2, 6), (1, 5))):
        expected = want[slot, top.ids[place, :count].long()]
        torch.testing.assert_close(top.logprobs[place, :count], expected)


def test_a_slot_forgets_the_tokens_that_were_named() -> None:
    sampler, table = make([row(0, changed(logprob_ids=[3])), row(1, PLAIN)])
    slots = np.array([0])
    assert not sampler.is_capturable(slots) and sampler.is_capturable(np.array([1]))
    sampler.enter([row(0, PLAIN)])
    assert sampler.is_capturable(slots)
    assert draw(sampler, table, [0], [3], torch.randn(1, 100)).top is None


@pytest.mark.parametrize("bad", [{"top_k": 2**63}, {"top_logprobs": 2**31}])
def test_a_row_that_no_table_holds_changes_nothing(bad: dict[str, int]) -> None:
    sampler, table = make([row(0, changed(temperature=0.0)), row(1, changed(seed=9))])
    logits = torch.randn(2, 100)
    before = draw(sampler, table, [0, 1], [3, 3], logits)
    with pytest.raises(OverflowError):
        sampler.enter([row(0, changed(temperature=3.0, seed=77)), row(1, changed(**bad))])
    after = draw(sampler, table, [0, 1], [3, 3], logits)
    assert after.token_S.tolist() == before.token_S.tolist() and after.top is None


def test_seeds_of_any_size_are_taken() -> None:
    sampler, table = make([row(0, changed(seed=2**64 - 1)), row(1, changed(seed=-1))])
    logits = torch.randn(1, 50)
    first = draw(sampler, table, [0], [3], logits)
    second = draw(sampler, table, [1], [3], logits)
    assert first.token_S[0] == second.token_S[0]


def test_the_table_keeps_sampled_tokens_within_the_context() -> None:
    _, table = make([row(0, PLAIN)])
    table.append(torch.tensor([0, 0]), torch.tensor([3, 16]), torch.tensor([7, 8]))
    assert table.token_ids[0, :4].tolist() == [1, 2, 3, 7]
    assert 8 not in table.token_ids[0].tolist()


def test_rows_that_need_more_than_temperature_are_not_plain() -> None:
    sampler = Sampler(num_slots=7, device=torch.device("cpu"), backend="torch")
    special = [
        changed(top_k=3),
        changed(min_p=0.1),
        changed(presence_penalty=0.5),
        changed(top_logprobs=2),
        changed(entropy=True),
    ]
    ids = np.array([1, 2], dtype=np.int32)
    rows = [
        NewRow(slot=slot, token_ids=ids, prompt_len=2, sampling=sampling)
        for slot, sampling in enumerate([PLAIN, *special])
    ]
    sampler.enter(rows)

    def is_plain(*slots: int) -> bool:
        chosen = np.array(slots)
        return sampler.is_capturable(chosen) and sampler.options(chosen) == DrawOptions()

    assert is_plain(0, 6)
    for slot in range(1, 6):
        assert not is_plain(0, slot)
    sampler.enter([NewRow(slot=3, token_ids=ids, prompt_len=2, sampling=PLAIN)])
    assert is_plain(0, 3)


def test_filters_and_entropy_can_be_captured_and_edits_cannot() -> None:
    rows = [PLAIN, changed(top_p=0.5), changed(entropy=True), changed(presence_penalty=0.5)]
    sampler, _ = make([row(slot, sampling) for slot, sampling in enumerate(rows)])
    assert sampler.is_capturable(np.array([0, 1, 2]))
    assert not sampler.is_capturable(np.array([0, 3]))
    assert sampler.options(np.array([0])) == DrawOptions()
    assert sampler.options(np.array([0, 1])) == DrawOptions(filtered=True)
    assert sampler.options(np.array([1, 2])) == DrawOptions(filtered=True, entropy=True)


def test_more_options_than_the_rows_need_change_nothing() -> None:
    """A graph for filtered rows may serve rows without a filter."""
    sampler, _ = make([row(slot, changed(seed=slot)) for slot in range(3)])
    logits, slots, positions = torch.randn(3, 400), torch.arange(3), torch.full((3,), 5)
    want = sampler.draw_plain(logits, slots, positions)
    entropy = torch.empty(3)
    options = DrawOptions(filtered=True, entropy=True)
    got = sampler.draw_plain(logits, slots, positions, options, entropy)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    torch.testing.assert_close(entropy, torch.special.entr(logits.softmax(-1)).sum(-1))

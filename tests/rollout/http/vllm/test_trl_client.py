"""TRL's own `VLLMClient` against a server of the fake engine.

Runs where trl can be imported. Its weight transfer needs the vllm package and a GPU, so only
the calls around it are made here; `transcripts/trl_*.json` has the whole sequence.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.fake_executor import expected_tokens
from tests.helpers.serve_process import FAKE_WITH_TEXT, ServerProcess
from tests.helpers.tiny_tokenizer import ids_of, tiny_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("trl.generation.vllm_client")
    with pytest.MonkeyPatch.context() as patch, ServerProcess(["-c", FAKE_WITH_TEXT]) as server:
        # The calls made here need nothing of vllm, which its constructor asks for.
        patch.setattr(module, "is_vllm_available", lambda **_: True)
        found = module.VLLMClient(base_url=server.url, connection_timeout=30)
        yield found
        found.session.close()


@pytest.mark.parametrize("prompts", [["ab", "c"], [ids_of("ab"), ids_of("c")]])
@pytest.mark.parametrize("logprobs", [0, 2, None])
def test_generate(client: Any, prompts: list[Any], logprobs: int | None) -> None:
    found = client.generate(prompts, n=2, max_tokens=4, logprobs=logprobs)
    assert found["prompt_ids"] == [ids_of("ab"), ids_of("c")]
    expected = [expected_tokens(ids_of(text), 4) for text in ("ab", "ab", "c", "c")]
    assert found["completion_ids"] == expected
    if logprobs is None:
        assert found["logprobs"] is None
        return
    for ids, values, tokens in zip(
        expected, found["logprobs"], found["logprob_token_ids"], strict=True
    ):
        for token, row, names in zip(ids, values, tokens, strict=True):
            assert row[names.index(token)] == pytest.approx(-token / 100)
            assert len(row) == max(1, logprobs)


def test_chat(client: Any) -> None:
    messages = [[{"role": "user", "content": "abc"}], [{"role": "user", "content": "d"}]]
    found = client.chat(messages, n=2, max_tokens=3)
    prompts = [tiny_tokenizer().apply_chat_template(each) for each in messages]
    assert found["prompt_ids"] == prompts
    expected = [expected_tokens(prompt, 3) for prompt in prompts for _ in range(2)]
    assert found["completion_ids"] == expected
    assert found["logprobs"][0][0][0] == pytest.approx(-expected[0][0] / 100)


def test_scores_of_a_teacher(client: Any) -> None:
    sequences = [ids_of("abcd"), ids_of("xy")]
    found = client.get_sequence_logprobs(sequences, [2, 1], top_logprobs=3)
    assert found["actual_token_ids"] == [[[token] for token in ids_of("cd")], [[ids_of("y")[0]]]]
    for row, tokens in zip(found["actual_logprobs"], found["actual_token_ids"], strict=True):
        for value, token in zip(row, tokens, strict=True):
            assert value == pytest.approx([-token[0] / 100])
    assert all(len(position) == 3 for row in found["logprobs"] for position in row)


def test_calls_around_the_weight_transfer(client: Any) -> None:
    assert client.get_server_info()["weight_transfer_config"] is not None
    assert client.get_world_size() == 1
    client.reset_prefix_cache()
    with pytest.raises(Exception, match="409"):
        client._finish_weight_update()
    client._start_weight_update()
    client._finish_weight_update()

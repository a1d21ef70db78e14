"""Tokenizers of Hugging Face folders: encoding, decoding, chats, and files written back."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from engine.errors import CheckpointError, InvalidRequest, ModelNotFound
from rollout.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.tiny_tokenizer import (
    BOS_ID,
    EOS_ID,
    IM_END_ID,
    IM_START_ID,
    TEMPLATE,
    ids_of,
    tiny_tokenizer,
)

PROBES = [
    "Hello world",
    "x = 12345 + 6.75e-10; 2024-01-02",
    "  two  spaces\n\n\ttabs \n ends ",
    "naïve café Ünïcödé — “quotes” 'don't' we'll I'M",
    "👩‍👩‍👧 🎉🇩🇪 mixed 你好，世界 日本語 한국어 العربية",
    "<|im_start|>user\nWhat is 7*8?<|im_end|>\n<|im_start|>assistant\n",
    "def f(x: int) -> str:\n    return f'{x!r}'  # naïve\n",
    "<|endoftext|>x<|im_end|>",
    "",
]
CHAT = [
    {"role": "user", "content": "largest of 3 17 88?"},
    {"role": "assistant", "content": "88"},
    {"role": "user", "content": "é 5"},
]


def save(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    """Write it as a folder, with changes to its configuration (None removes a key)."""
    tokenizer.write_hf(folder)
    path = folder / "tokenizer_config.json"
    merged = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    return folder


@given(st.text(max_size=50))
def test_decode_undoes_encode(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_special_tokens_of_encode_and_decode() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    assert tokenizer.encode("a") == [BOS_ID, *ids_of("a")]
    assert tokenizer.encode("a", add_special_tokens=False) == ids_of("a")
    assert tokenizer.decode([BOS_ID, *ids_of("a")]) == "a"
    ids = np.array([BOS_ID, *ids_of("a")], np.int32)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|>a"
    assert tokenizer.special_token_id("<|im_end|>") == IM_END_ID
    assert tokenizer.special_token_id("im_end") is None
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (BOS_ID, [EOS_ID], 300)


def test_ids_beyond_the_vocabulary_give_nothing() -> None:
    assert tiny_tokenizer().decode([*ids_of("a"), 100_000]) == "a"


def test_chat_template_writes_the_special_tokens_and_no_bos() -> None:
    ids = tiny_tokenizer(add_bos=True).apply_chat_template([{"role": "user", "content": "a"}])
    assert ids[0] == IM_START_ID
    assert ids.count(BOS_ID) == 0
    assert ids.count(IM_START_ID) == 2


def test_chat_without_a_template() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        tiny_tokenizer(template=None).render_chat(CHAT)


def test_written_folder_reads_back(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    tokenizer.write_hf(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("a<|im_end|>é") == tokenizer.encode("a<|im_end|>é")
    assert (again.eos_ids, again.bos_id) == (tokenizer.eos_ids, tokenizer.bos_id)
    assert again.chat_template == TEMPLATE
    assert load_tokenizer(tmp_path / "config.json").encode("a") == again.encode("a")


def test_eos_ids_join_the_generation_config(tmp_path: Path) -> None:
    save(tiny_tokenizer(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [258, 299]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(tmp_path).eos_ids == [EOS_ID, 258]


@pytest.mark.parametrize("flag", [True, False, "null"])
@pytest.mark.parametrize("adds", [True, False])
def test_the_post_processor_alone_says_what_is_added(
    tmp_path: Path, adds: bool, flag: object
) -> None:
    save(tiny_tokenizer(add_bos=adds), tmp_path, add_bos_token=flag, add_eos_token=flag)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"null"', "null"))
    assert load_tokenizer(tmp_path).encode("a") == [BOS_ID] * adds + ids_of("a")


def test_templates_by_name(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    save(tiny_tokenizer(template=None), tmp_path, chat_template=named)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.render_chat(CHAT) == "d"
    assert tokenizer.render_chat(CHAT, tools=[{"a": 1}]) == "t"
    tokenizer.write_hf(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").render_chat(CHAT, tools=[]) == "t"
    save(tiny_tokenizer(template=None), tmp_path / "no", chat_template=named[:1])
    with pytest.raises(InvalidRequest, match="no chat template but tool_use"):
        load_tokenizer(tmp_path / "no").render_chat(CHAT)


def test_text_that_no_token_can_express_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidRequest, match="cannot encode"):
        load_tokenizer(tmp_path).encode("b")


def test_template_from_the_configuration_or_its_list(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(template=None)
    assert load_tokenizer(save(tokenizer, tmp_path)).chat_template is None
    save(tokenizer, tmp_path, chat_template="one")
    assert load_tokenizer(tmp_path).chat_template == "one"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    save(tokenizer, tmp_path, chat_template=named)
    assert load_tokenizer(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_template == "file"


def test_tokens_that_only_the_configuration_has(tmp_path: Path) -> None:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    extra = {"300": {"content": "<new>", "special": True, **flags}}
    save(tiny_tokenizer(), tmp_path, added_tokens_decoder=extra)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<new>") == [300]
    assert tokenizer.decode([300]) == ""
    misplaced = {"700": {"content": "<far>", "special": True, **flags}}
    save(tiny_tokenizer(), tmp_path, added_tokens_decoder=misplaced)
    with pytest.raises(CheckpointError, match="700"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["absent", "absent.gguf", "absent/config.json", "x.bin"])
def test_missing_models_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match=name.split("/")[0]) as caught:
        load_tokenizer(tmp_path / name)
    assert caught.value.field == "model"


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="holds no model"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}'])
def test_broken_tokenizer_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_broken_configuration_file(tmp_path: Path) -> None:
    save(tiny_tokenizer(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_saved_in_the_file_do_not_apply(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer._backend.enable_truncation(2)
    tokenizer._backend.enable_padding(length=9)
    save(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).encode("abcd") == ids_of("abcd")


def test_user_defined_tokens_survive_skipping(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer._backend.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.write_hf(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.decode(again.encode("a<think>b")) == "a<think>b"


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tiny_tokenizer(add_bos=True)
    tokenizer.write_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in PROBES:
        assert theirs.encode(text) == tokenizer.encode(text), text
    ids = tokenizer.encode(PROBES[3])
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    chat = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert chat == tokenizer.render_chat(CHAT)
    assert (theirs.bos_token, theirs.eos_token) == ("<|bos|>", "<|eos|>")


@pytest.mark.slow
def test_gguf_tokenizer_equals_transformers(default_model: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = Path(default_model)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer(path)
    ours.write_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in PROBES:
        ids = ours.encode(text)
        assert ids == theirs.encode(text) == exported.encode(text), text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for theirs_or_exported in (theirs, exported):
        chat = theirs_or_exported.apply_chat_template(
            CHAT, add_generation_prompt=True, tokenize=False
        )
        assert chat == ours.render_chat(CHAT)
    assert (ours.eos_ids, ours.bos_id) == ([theirs.eos_token_id], theirs.bos_token_id)
    assert ours.vocab_size == len(theirs)


def test_two_texts_are_joined_and_cut_as_one() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    assert tokenizer.encode_pair("ab") == tokenizer.encode("ab")
    assert tokenizer.encode_pair("ab", "cd") == [BOS_ID, *ids_of("ab"), BOS_ID, *ids_of("cd")]
    plain = tokenizer.encode_pair("ab", "cd", add_special_tokens=False)
    assert plain == ids_of("abcd")
    assert tokenizer.encode_pair("abcdef", max_tokens=3) == [BOS_ID, *ids_of("ab")]
    assert tokenizer.encode_pair("abcdef", max_tokens=3, keeps="last") == [BOS_ID, *ids_of("ef")]
    assert tokenizer.encode_pair("ab", "cd", max_tokens=6) == tokenizer.encode_pair("ab", "cd")
    cut = tokenizer.encode_pair("ab", "cdef", max_tokens=6, keeps="last")
    assert cut == [BOS_ID, *ids_of("ab"), BOS_ID, *ids_of("ef")]
    with pytest.raises(InvalidRequest, match="no room"):
        tokenizer.encode_pair("ab", "cd", max_tokens=4)

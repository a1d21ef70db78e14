"""Which tokenizer transformers makes of a folder, and that tokenizer.

Most classes of transformers take tokenizer.json as it is. Some take vocabulary, merges and
post-processor alone and fix the rest themselves (transformers 5,
models/*/tokenization_*.py::__init__); those that the served families use are rebuilt here, the
others are refused. Which class it is depends on `tokenizer_class` and on the model type
(models/auto/tokenization_auto.py::AutoTokenizer.from_pretrained).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.errors import CheckpointError
from rollout.text.folder.json_files import (
    as_text,
    broken,
    optional_flag,
    optional_text,
    parse_object,
)

_CONFIG = "tokenizer_config.json"
_CLASS = "tokenizer_class"
_FILE = "TokenizersBackend"

_MODEL_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "gemma3": "GemmaTokenizer",
        "gemma3_text": "GemmaTokenizer",
        "mistral": _FILE,
        "olmo2": _FILE,
        "qwen2": "Qwen2Tokenizer",
        "qwen3": "Qwen2Tokenizer",
    }
)
# Of these transformers believes no tokenizer_class.
_OVERRULED = ("qwen2",)

# Classes of transformers, without "Tokenizer" at the end, that build their own.
# fmt: off
_REFUSED = frozenset(
    (
        "Albert", "Bart", "Barthez", "Bartpho", "Basic", "Bert", "BertGeneration",
        "BertJapanese", "Bertweet", "BigBird", "BioGpt", "Blenderbot", "BlenderbotSmall", "ByT5",
        "CLIP", "CTRL", "Camembert", "Canine", "Character", "Clvp", "CodeGen", "CodeLlama",
        "Cohere", "ConvBert", "Cpm", "CpmAnt", "DPRContextEncoder", "DPRQuestionEncoder",
        "DPRReader", "Deberta", "DebertaV2", "Dia", "DistilBert", "Electra", "Esm", "Esmc",
        "FNet", "FSMT", "FastSpeech2Conformer", "Flaubert", "Funnel", "GPTNeoX",
        "GPTNeoXJapanese", "GPTSw3", "Herbert", "LED", "Lasr", "LayoutLM", "LayoutLMv2",
        "LayoutLMv3", "LayoutXLM", "Longformer", "Luke", "Lxmert", "M2M100", "MBart", "MBart50",
        "MLuke", "MPNet", "Marian", "MarkupLM", "Mecab", "Mgpstr", "MobileBert", "Mvp", "MyT5",
        "Nllb", "Nougat", "OpenAIGPT", "PLBart", "Parakeet", "Pegasus", "Perceiver", "Phobert",
        "Pop2Piano", "ProphetNet", "Qwen3_5", "Rag", "Reformer", "RemBert", "RoCBert",
        "RoFormer", "Roberta", "SeamlessM4T", "Siglip", "Siglip2", "Speech2Text", "SpeechT5",
        "Splinter", "SqueezeBert", "T5", "Tapas", "Tipsv2", "Udop", "VideoPrism", "Vits",
        "Wav2Vec2", "Wav2Vec2CTC", "Wav2Vec2PhonemeCTC", "Whisper", "Wordpiece", "XGLM", "XLM",
        "XLMRoberta", "XLNet",
    )
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """backend: from text to ids, but for tokens that only the configuration declares.

    source: contents of tokenizer.json. defaults: roles that the class has where no file speaks of
    them. finally_special: whether the class marks every token with a role as special at the end.
    """

    backend: Tokenizer
    source: dict[str, Any]
    defaults: Mapping[str, str | None]
    finally_special: bool = False


def read_pipeline(
    folder: Path, config: dict[str, Any], model: dict[str, Any], text: str
) -> Pipeline:
    """The tokenizer of `folder`.

    config, model: contents of tokenizer_config.json and config.json. text: of tokenizer.json.
    Raises CheckpointError naming the file, and the key where there is one.
    """
    path = folder / "tokenizer.json"
    backend = _parse(path, text)
    source = parse_object(path, text)
    _refuse_chance(path, source)
    _check_added(path, source.get("post_processor"))
    name = _class_name(folder, config, model, text)
    if name == _FILE:
        return Pipeline(backend=backend, source=source, defaults={})
    fields = source.get("model")
    if not isinstance(fields, dict) or not isinstance(backend.model, models.BPE):
        what = f"is {name}, which is made of BPE, but the model of {path} is of another type"
        raise broken(folder / _CONFIG, _CLASS, what)
    rebuilt = _REBUILT[name](folder / _CONFIG, config, fields)
    rebuilt.post_processor = backend.post_processor
    return Pipeline(
        backend=rebuilt,
        source=source,
        defaults=_DEFAULTS[name],
        finally_special=name == "Qwen2Tokenizer",
    )


def _parse(path: Path, text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises bare Exception on bad JSON
        raise CheckpointError(f"{path} is not a tokenizer: {error}", field="model") from error


def _refuse_chance(path: Path, source: dict[str, Any]) -> None:
    fields = source.get("model")
    if isinstance(fields, dict) and fields.get("dropout"):
        what = f"is {fields['dropout']}: ids would differ from call to call; set it to null"
        raise broken(path, "model.dropout", what)


def _check_added(path: Path, processor: Any) -> None:
    """Every token that a template adds must have an id there: the tokenizers library looks it up
    when it encodes, and ends the thread if it is missing."""
    fields = processor if isinstance(processor, dict) else {}
    for part in fields.get("processors") or ():
        _check_added(path, part)
    if fields.get("type") != "TemplateProcessing":
        return
    for piece in fields["single"]:
        token = piece.get("SpecialToken", {}).get("id")
        if token is not None and token not in fields["special_tokens"]:
            what = f"has no entry for {token!r}, which 'single' adds"
            raise broken(path, "post_processor.special_tokens", what)


def _class_name(folder: Path, config: dict[str, Any], model: dict[str, Any], text: str) -> str:
    """The class that transformers' AutoTokenizer would take, _FILE for tokenizer.json as it is."""
    path = folder / _CONFIG
    model_type = optional_text(folder / "config.json", model, "model_type") or ""
    registered = _MODEL_CLASSES.get(model_type)
    own = optional_text(path, config, _CLASS)
    declared = own or optional_text(folder / "config.json", model, _CLASS)
    stem = declared and declared.removesuffix("Fast")
    if _brings_code(config) and model_type not in _OVERRULED:
        if registered is None and _served(path, own or "") is None:
            what = "names a tokenizer of the folder's own code, which is not run; remove it to take"
            raise broken(path, "auto_map", f"{what} tokenizer.json as it is")
        return _served(path, own or registered or "") or _FILE
    if stem == "LlamaTokenizer" and model_type not in _OVERRULED and '"ByteLevel"' in text:
        return _FILE
    if stem and registered and registered != stem:
        if registered == _FILE:
            return _FILE
        name = registered if model_type in _OVERRULED else stem
        return _served(path, name) or _FILE
    return _served(path, stem or registered or "") or _FILE


def _brings_code(config: dict[str, Any]) -> bool:
    found = config.get("auto_map")
    return bool(found.get("AutoTokenizer") if isinstance(found, dict) else found)


def _served(path: Path, name: str) -> str | None:
    """The class that makes the tokenizer; None if transformers has none of this name, and then
    takes tokenizer.json as it is."""
    stem = name.removesuffix("Fast")
    if stem.removesuffix("Tokenizer") in _REFUSED:
        what = f"{name} builds its tokenizer otherwise than tokenizer.json says and is not served"
        raise broken(path, _CLASS, f"{what}; served are {', '.join(_REBUILT)} and {_FILE}")
    if stem in ("PreTrainedTokenizer", "PythonBackend", "BloomTokenizer", _FILE):
        return _FILE
    return stem if stem in _REBUILT else None


def _bpe(fields: dict[str, Any], **options: Any) -> Tokenizer:
    merges: Any = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in fields.get("merges", [])
    ]
    return Tokenizer(models.BPE(vocab=fields["vocab"], merges=merges, **options))


def _prefix_space(path: Path, config: dict[str, Any], default: bool) -> bool:
    found = optional_flag(path, config, "add_prefix_space")
    return default if found is None else found


def _llama(path: Path, config: dict[str, Any], fields: dict[str, Any]) -> Tokenizer:
    backend = _bpe(fields, fuse_unk=True, byte_fallback=True)
    prefixed = _prefix_space(path, config, True)
    always = optional_flag(path, config, "legacy")
    scheme = ("always" if always else "first") if prefixed else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=scheme, split=False
    )
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback()]
    steps.append(decoders.Fuse())
    if prefixed:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen2(path: Path, config: dict[str, Any], fields: dict[str, Any]) -> Tokenizer:
    backend = _bpe(fields, continuing_subword_prefix="", end_of_word_suffix="")
    prefixed = _prefix_space(path, config, False)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=prefixed, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2(path: Path, config: dict[str, Any], fields: dict[str, Any]) -> Tokenizer:
    backend = _bpe(fields, continuing_subword_prefix="", end_of_word_suffix="")
    prefixed = _prefix_space(path, config, False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    backend.decoder = decoders.ByteLevel()
    return backend


def _gemma(path: Path, config: dict[str, Any], fields: dict[str, Any]) -> Tokenizer:
    found = config.get("unk_token")
    unknown = found.get("content") if isinstance(found, dict) else found
    unknown = "<unk>" if unknown is None else as_text(path, "unk_token", unknown)
    backend = _bpe(fields, fuse_unk=True, unk_token=unknown, byte_fallback=True)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(
        pattern=" ", behavior="merged_with_previous", invert=False
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


_Build = Callable[[Path, dict[str, Any], dict[str, Any]], Tokenizer]
_REBUILT: Mapping[str, _Build] = MappingProxyType(
    {
        "LlamaTokenizer": _llama,
        "Qwen2Tokenizer": _qwen2,
        "GPT2Tokenizer": _gpt2,
        "GemmaTokenizer": _gemma,
    }
)
_END = "<|endoftext|>"
_DEFAULTS: Mapping[str, Mapping[str, str | None]] = MappingProxyType(
    {
        "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
        "GPT2Tokenizer": {
            "unk_token": _END,
            "bos_token": _END,
            "eos_token": _END,
            "pad_token": None,
        },
        "GemmaTokenizer": {
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
    }
)

"""The teacher of an on-policy distillation: checked before a model is loaded, then an engine that
scores what the student samples."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ContextTooLong, InvalidRequest, ModelNotFound, SlipstreamError
from engine.protocol import ReplicaState
from recipes.actors.scorer import ScoringEngine, scoring_config
from recipes.settings.options import RunOptions
from recipes.world import World
from rollout.launch import read_checkpoint
from rollout.offline import Tokenizer, load_tokenizer
from trainer_bridge.hf import require_language_model


def check_teacher(options: RunOptions, tokenizer: Tokenizer, *, longest: int) -> None:
    """Look at the teacher that the options name, if they do, before a model is loaded.

    tokenizer: of the student. longest: tokens of the longest sequence the student may sample.
    Raises ModelNotFound, ModelError, InvalidRequest for other tokens than the student's, and
    ContextTooLong for a context shorter than `longest`; their field is `teacher`.
    """
    teacher = options.distillation.teacher
    if teacher is None:
        return
    if not Path(teacher).exists():
        raise ModelNotFound(
            f"teacher: nothing at {teacher}; give a Hugging Face folder or a .gguf file",
            field="teacher",
        )
    try:
        theirs = load_tokenizer(teacher)
        checkpoint = read_checkpoint(teacher)
        require_language_model(checkpoint.hf_config)
    except SlipstreamError as error:
        raise type(error)(f"teacher: {error.message}", field="teacher") from error
    told = _difference(tokenizer.vocabulary, theirs.vocabulary)
    if told:
        raise _other_vocabulary(teacher, told)
    if checkpoint.context_length < longest:
        raise ContextTooLong(
            f"teacher: {teacher} has a context of {checkpoint.context_length} tokens, and prompt "
            f"and reply may have {longest}; lower --max-new-tokens, or take another teacher",
            field="teacher",
        )


def launch_teacher(
    options: RunOptions, student: ReplicaState, world: World | None = None
) -> ScoringEngine | None:
    """Start the teacher's engine, if the options name one; collective. It shares the GPU of the
    main trainer process.

    student: its engine. Raises InvalidRequest (`teacher`) for a teacher that does not know all
    tokens that one samples; other errors as of `ScoringEngine`.
    """
    teacher = options.distillation.teacher
    if teacher is None:
        return None
    memory_gb = options.distillation.teacher_kv_memory_gb
    engine = ScoringEngine(
        scoring_config(options, teacher, kv_memory_gb=memory_gb),
        world,
        option="teacher",
        temperature=options.rollout.temperature,
    )
    theirs, needed = engine.state.vocab_size, student.vocab_size
    if theirs < needed:
        engine.close()
        told = f"the student's logits have {needed} entries, the teacher's {theirs}"
        raise _other_vocabulary(teacher, told)
    return engine


def _other_vocabulary(teacher: str, told: str) -> InvalidRequest:
    return InvalidRequest(
        f"teacher: {teacher} has another vocabulary than the student: {told}; take a teacher that "
        "was trained with the same tokenizer",
        field="teacher",
    )


def _difference(student: dict[str, int], teacher: dict[str, int]) -> str:
    """What the vocabularies differ in, ids by token; "" if they are equal."""
    for token, index in student.items():
        if teacher.get(token) != index:
            other = teacher.get(token, "no token")
            return f"{token!r} is {index} for the student and {other} for the teacher"
    more = len(teacher) - len(student)
    return f"the teacher has {more} tokens more" if more else ""

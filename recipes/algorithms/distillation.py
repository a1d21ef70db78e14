"""On-policy distillation: the student samples, and the teacher says of each token how likely it
would have been to come next.

The advantage of a token is the negative of the k1 estimate of KL(student || teacher) there: the
reverse KL falls where tokens that the teacher thinks likelier are reinforced (MiniLLM, arXiv
2306.08543; GKD, arXiv 2306.13649). Each token is judged by itself, without what comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.protocol import FloatArray


def distillation_advantages(
    teacher: Sequence[FloatArray], student: Sequence[FloatArray]
) -> tuple[FloatArray, ...]:
    """log p_teacher - log p_student of the tokens that the student sampled.

    teacher, student: N arrays float32 [response_len] each, at the same temperature; the student's
    is the policy before the update. Returns the same shapes.
    """
    pairs = zip(teacher, student, strict=True)
    return tuple(teacher_K - student_K for teacher_K, student_K in pairs)


def mean_gap(teacher: Sequence[FloatArray], student: Sequence[FloatArray]) -> float:
    """The k1 estimate of KL(student || teacher): the mean over all tokens of log p_student -
    log p_teacher; 0 without tokens."""
    num_tokens = sum(len(array) for array in teacher)
    gaps = distillation_advantages(teacher, student)
    return -sum(float(gap_K.sum()) for gap_K in gaps) / max(num_tokens, 1)

"""The model that a critic of its own starts from, looked at before any is loaded."""

from __future__ import annotations

from engine.errors import ContextTooLong, InvalidRequest, SlipstreamError
from recipes.settings.options import PpoOptions, RunOptions
from rollout.launch import read_checkpoint
from rollout.offline import Tokenizer, load_tokenizer


def check_critic_model(options: RunOptions, tokenizer: Tokenizer, *, longest: int) -> None:
    """Look at the critic's model that the options name, if they do.

    tokenizer: of the policy. longest: tokens of the longest sequence that the policy may sample.
    Raises ModelNotFound, ModelError, InvalidRequest for other tokens than the policy's and for a
    classifier of several labels, and ContextTooLong for a context shorter than `longest`; their
    field is `critic_model`.
    """
    if not isinstance(options, PpoOptions) or options.value_function.critic_model is None:
        return
    path = options.value_function.critic_model
    try:
        _check_tokens(path, tokenizer, load_tokenizer(path))
        checkpoint = read_checkpoint(path)
    except SlipstreamError as error:
        told = error.message.removeprefix("critic_model: ")
        raise type(error)(f"critic_model: {told}", field="critic_model") from error
    if checkpoint.num_labels > 1:
        raise InvalidRequest(
            f"critic_model: {path} scores {checkpoint.num_labels} labels, and a critic has one "
            "value; give a reward model of one label, or a language model",
            field="critic_model",
        )
    if checkpoint.context_length < longest:
        raise ContextTooLong(
            f"critic_model: {path} has a context of {checkpoint.context_length} tokens, and prompt "
            f"and reply may have {longest}; lower --max-new-tokens, or take another model",
            field="critic_model",
        )


def _check_tokens(path: str, policy: Tokenizer, critic: Tokenizer) -> None:
    sizes = f"{path} has {critic.vocab_size:,} tokens, the policy {policy.vocab_size:,}"
    hint = "give a critic of the policy's family, or leave --critic-model out to start from it"
    if critic.vocab_size != policy.vocab_size:
        raise InvalidRequest(f"{sizes}; {hint}", field="critic_model")
    for token_id in range(policy.vocab_size):
        ours, theirs = policy.token_bytes(token_id), critic.token_bytes(token_id)
        if ours != theirs:
            raise InvalidRequest(
                f"{sizes}, but token {token_id} is {theirs!r} there and {ours!r} here; {hint}",
                field="critic_model",
            )

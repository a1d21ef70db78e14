"""Masks: which tokens a sequence may get next, asked for once its last token is known.

`base` says what a source of masks is, `allowed` is the one of `Request.allowed_token_ids`, and
`gate` holds the step whose sampling waits.
"""

"""Where the members of a weight-update group find each other in the trainer's store.

The keys of a back end are those that torch's own helper derives for a group of this name behind
`PrefixStore(name)`, as OpenRLHF, slime and SGLang form it, so that either side may be theirs.
"""

from __future__ import annotations

NCCL_ID_KEY = "0"
"""Behind `backend_prefix(name, "cuda")`: the unique id of the group's first communicator."""


def joined_key(rank: int) -> str:
    """Behind `PrefixStore(name)`: set by a member of ours when it comes, so that an absent one
    can be named."""
    return f"slipstream/joined/{rank}"


def backend_prefix(name: str, device: str) -> str:
    """What a back end's keys have behind `PrefixStore(name)`. device: "cuda" or "cpu"."""
    return f"{name}//{device}/"


def pair_prefix(sender: int, rank: int) -> str:
    """What the keys of the connection between two ranks have behind `backend_prefix`, where each
    pair has its own."""
    return f"pair/{sender}/{rank}/"

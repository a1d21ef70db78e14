"""Where the members of a weight-update group find each other in the trainer's store.

The keys of a back end are those that torch's own helper derives for a group of this name behind
`PrefixStore(name)`, as OpenRLHF, slime and SGLang form it, so that either side may be theirs.
"""

from __future__ import annotations

NCCL_ID_KEY = "0"
"""Behind `backend_prefix(name, "cuda")`: the unique id of the group's first communicator."""

RES_OPTIONS = "timeout:1 attempts:5"
"""For the environment variable of that name, by which glibc's resolver asks again after one second
in place of five (resolv.conf(5)). torch's stores look up the name of every peer for their log;
they connect by IPv6, `::ffff:127.0.0.1` included, which no /etc/hosts names, so that one lost
packet of a name server stalls whoever forms a group."""


def joined_key(rank: int) -> str:
    """Behind `PrefixStore(name)`: set by a member of ours when it comes, so that an absent one
    can be named."""
    return f"slipstream/joined/{rank}"


def backend_prefix(name: str, device: str) -> str:
    """What a back end's keys have behind `PrefixStore(name)`. device: "cuda" or "cpu"."""
    return f"{name}//{device}/"

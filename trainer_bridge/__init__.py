"""What a trainer process imports to publish its weights to an engine.

    from trainer_bridge import push
    push(model, version, replica)

Submodules are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer_bridge.bridge import PushReport, push
    from trainer_bridge.hf import load_causal_lm, load_classifier

__all__ = ["PushReport", "load_causal_lm", "load_classifier", "push"]


def __getattr__(name: str) -> Any:
    if name in ("push", "PushReport"):
        from trainer_bridge import bridge

        return getattr(bridge, name)
    if name in ("load_causal_lm", "load_classifier"):
        from trainer_bridge import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'trainer_bridge' has no attribute {name!r}")

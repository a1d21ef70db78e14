"""Every route of the server with examples of its bodies, for tests that spoil them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rollout.http.config import ServeConfig
from rollout.http.engine.client import AsyncEngine
from rollout.http.openapi import document
from rollout.http.services import make_services
from tests.helpers.control_calls import GROUP, bucket
from tests.helpers.hostile_json import Bodies, Path
from tests.helpers.http_app import InlineLink
from tests.helpers.replicas import fake_config

_SHORT = {"max_new_tokens": 2}
# Bodies that do something, where the schema alone gives one that is refused at once.
_WORKING: dict[tuple[str, int], dict[str, Any]] = {
    ("/generate", 0): {"input_ids": [5, 6], "sampling_params": _SHORT, "return_logprob": True},
    ("/generate", 1): {"text": ["a", "b"], "sampling_params": _SHORT},
    ("/v1/completions", 0): {"prompt": [5, 6], "max_tokens": 2, "logprobs": 1},
    ("/v1/chat/completions", 0): {
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 2,
    },
    ("/v1/responses", 0): {"input": "a", "max_output_tokens": 2},
    ("/v1/messages", 0): {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    ("/v1/embeddings", 0): {"input": ["a", "b"], "dimensions": 2},
    ("/v1/embeddings", 1): {"messages": [{"role": "user", "content": "a"}]},
    ("/encode", 0): {"text": "a"},
    ("/v1/score", 0): {"text_1": "a", "text_2": ["b", "c"]},
    ("/v1/score", 1): {"query": [5], "items": [[6]], "label_token_ids": [7]},
    ("/rerank", 0): {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1},
    ("/init_weight_transfer_engine", 0): {
        "init_info": {
            "master_address": "127.0.0.1",
            "master_port": 1,
            "rank_offset": 1,
            "world_size": 2,
        }
    },
    # The fake model adds this number to every token, so "0" leaves what is expected as it is.
    ("/update_weights_from_disk", 0): {"model_path": "0"},
    ("/init_weights_update_group", 0): {
        **GROUP,
        "group_name": "g",
        "backend": "gloo",
        "timeout_s": 1,
    },
    ("/update_weights_from_distributed", 0): bucket(
        load_format="flattened_bucket", weight_version="1", partial=True, timeout_s=1.0
    ),
    ("/update_weights_from_tensor", 0): {
        "serialized_named_tensors": [base64.b64encode(b"x").decode()],
        "load_format": "direct",
    },
    ("/pull_weights", 0): {
        "target_version": 1,
        "local_checkpoint_dir": "/absent/l",
        "source_dir": "",
    },
    ("/get_weights_by_name", 0): {"name": "w", "truncate_size": 4},
    ("/update_weights", 0): {
        "update_info": {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]},
        "partial": True,
    },
}


@dataclass(frozen=True)
class RouteBody:
    """One kind of body of one route. paths: where it can be spoiled."""

    method: str
    path: str
    tag: str
    body: Any
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.method} {self.path}{' ' + self.tag if self.tag else ''}"


def openapi() -> dict[str, Any]:
    """The document of a server over the fake engine."""
    from rollout.http.app import build_routes
    from rollout.http.edge.routes import Routes

    config = ServeConfig(engine=fake_config())
    app = build_routes(make_services(config, AsyncEngine(InlineLink(config.engine)), None))
    found = Routes()
    found.routes += app.routes
    return document(config, [found], frozenset())


def route_bodies() -> Iterator[RouteBody]:
    """Every kind of body of every route that takes one."""
    found = openapi()
    bodies = Bodies(found["components"]["schemas"])
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            if "requestBody" not in operation:
                continue
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            for number, option in enumerate(schema.get("anyOf", [schema])):
                body = _WORKING.get((path, number)) or bodies.example(option)
                tag = body.get("type", "") or str(number or "")
                paths = tuple(dict.fromkeys(bodies.paths(option, body)))
                yield RouteBody(method.upper(), path, tag, body, paths)


def query_routes() -> Iterator[tuple[str, str, str]]:
    """Method, path and name of every parameter of a query."""
    for path, methods in openapi()["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", []):
                if parameter["in"] != "query":
                    continue
                yield method.upper(), path, parameter["name"]

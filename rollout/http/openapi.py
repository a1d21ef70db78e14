"""GET /openapi.json: every route of the application, with the bodies it reads.

The document is made from the routes themselves and from the structs that their bodies are decoded
into, so it states the fields, defaults and ranges that the server checks. A route names its struct
where it is declared: `routes.add_api_route(path, handler, openapi_extra=takes(Struct))`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import Response

from engine.protocol import GenerateRequest
from rollout.http.config import ServeConfig
from rollout.http.edge.errors import json_response
from rollout.http.edge.guard import is_open
from rollout.http.edge.routes import HandlerRoute, Routes
from rollout.http.status.facts import package_version

PATH = "/openapi.json"
_SCHEMAS = "#/components/schemas/"
_BODY, _QUERY, _BATCHES = "body", "query", "batches"
_NOT_WORD = re.compile(r"[^A-Za-z0-9]+")
_WITH_BODY = frozenset({"POST", "PUT"})


def takes(body: Any = None, *, query: Any = None, batches: bool = False) -> dict[str, Any]:
    """What a route reads, for its `openapi_extra`.

    body, query: the struct, or union of structs, of its JSON body and of its query string; of a
    body that may be of one kind or another, a tuple of their structs.
    batches: each field of the body may also be a list with a value an item, as in /generate.
    """
    return {_BODY: body, _QUERY: query, _BATCHES: batches}


def router(
    config: ServeConfig, routers: Sequence[Routes], control_paths: Collection[str]
) -> Routes:
    """The route that serves the document of `routers`. control_paths: those that take the admin
    key."""
    routes = Routes()

    async def openapi() -> Response:
        return json_response(document(config, [*routers, routes], control_paths))

    routes.add_api_route(PATH, openapi, methods=["GET"])
    return routes


def document(
    config: ServeConfig, routers: Sequence[Routes], control_paths: Collection[str]
) -> dict[str, Any]:
    """The OpenAPI 3.1 document of every route of `routers`."""
    routes = [route for router in routers for route in router.routes]
    schemas, components = _schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operations = paths.setdefault(route.path_format, {})
        for method in sorted(route.methods or ()):
            operation = _operation(route, method, schemas)
            operation["security"] = _security(route.path, config, control_paths)
            operations[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Slipstream", "version": package_version()},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR, "GenerateBatch": _batch(components)},
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer", "description": "--api-key"},
                "adminApiKey": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "--admin-api-key",
                },
            },
        },
    }


_ERROR = {
    "description": "What every refusal and failure answers.",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "field", "param", "code"],
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "field": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            },
        }
    },
}
_ERROR_CONTENT = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}Error"}}}


def _reads(route: HandlerRoute) -> Mapping[str, Any]:
    return route.openapi_extra or takes()


def _bodies(route: HandlerRoute) -> tuple[Any, ...]:
    """The kinds of body that a route reads."""
    body = _reads(route)[_BODY]
    return body if isinstance(body, tuple) else () if body is None else (body,)


def _schemas(routes: list[HandlerRoute]) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """The schema of every struct that a route reads, and all the components they refer to."""
    kinds = {GenerateRequest: None}
    for route in routes:
        kinds |= {kind: None for kind in (*_bodies(route), _reads(route)[_QUERY]) if kind}
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_SCHEMAS + "{name}")
    components = {name: _with_nulls(schema) for name, schema in components.items()}
    return dict(zip(kinds, schemas, strict=True)), components


def _with_nulls(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a struct whose fields may be null where they may be left out."""
    required = schema.get("required", [])
    fields = schema.get("properties", {})
    return schema | {
        "properties": {
            name: field if name in required else _or_null(field) for name, field in fields.items()
        }
    }


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    inner = {key: value for key, value in field.items() if key != "default"}
    options = inner.pop("anyOf", None) or [inner]
    if {"type": "null"} not in options and inner != {}:
        options = [*options, {"type": "null"}]
    default = {"default": field["default"]} if "default" in field else {}
    return {"anyOf": options, **default}


def _operation(
    route: HandlerRoute, method: str, schemas: dict[Any, dict[str, Any]]
) -> dict[str, Any]:
    reads = _reads(route)
    operation: dict[str, Any] = {
        "operationId": method.lower() + _NOT_WORD.sub("_", route.path_format).rstrip("_"),
        "responses": {
            "200": {"description": "The answer."},
            "4XX": {"description": "The request is refused.", "content": _ERROR_CONTENT},
            "503": {"description": "The engine cannot serve it.", "content": _ERROR_CONTENT},
        },
    }
    bodies, query = _bodies(route), reads[_QUERY]
    if bodies and method in _WITH_BODY:
        options = [schemas[body] for body in bodies]
        if reads[_BATCHES]:
            options.append({"$ref": f"{_SCHEMAS}GenerateBatch"})
        schema = options[0] if len(options) == 1 else {"anyOf": options}
        operation["requestBody"] = {
            "required": all(map(_has_required, bodies)),
            "content": {"application/json": {"schema": schema}},
        }
    parameters = [_path_parameter(name) for name in route.param_convertors]
    if query is not None:
        parameters += _parameters(query)
    if parameters:
        operation["parameters"] = parameters
    return operation


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _has_required(kind: Any) -> bool:
    """Whether an empty body is refused."""
    return not isinstance(kind, type) or any(
        field.required for field in msgspec.structs.fields(kind)
    )


def _parameters(kind: Any) -> Iterator[dict[str, Any]]:
    _, components = msgspec.json.schema_components([kind], ref_template=_SCHEMAS + "{name}")
    (schema,) = components.values()
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        yield {"name": name, "in": "query", "required": name in required, "schema": field}


def _security(
    path: str, config: ServeConfig, control_paths: Collection[str]
) -> list[dict[str, list[str]]]:
    """What `guard` asks of a path, as the server is configured."""
    if is_open(path):
        return []
    if path in control_paths and config.admin_api_key:
        return [{"adminApiKey": []}]
    return [{"apiKey": []}] if config.api_key else []


def _batch(components: dict[str, Any]) -> dict[str, Any]:
    """The native body with a list of prompts: other fields are for all items or a list of one
    value an item."""
    single = components[GenerateRequest.__name__]["properties"]
    shared = {"stream"}
    prompts = {"text", "input_ids"}
    fields = {
        name: schema
        if name in shared
        else {"type": "array", "items": schema}
        if name in prompts
        else {"anyOf": [schema, {"type": "array", "items": schema}]}
        for name, schema in single.items()
    }
    return {"title": "GenerateBatch", "type": "object", "properties": fields}

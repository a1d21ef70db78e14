"""The pool of routes: rows written by layer, read by page, and bits that stand for no route."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.kv.route_pool import RoutePool, route_page_bytes
from engine.protocol import ExpertFacts, RouteRead, route_dtype

CPU = torch.device("cpu")
PAGE = 4


def facts(num_experts: int = 200) -> ExpertFacts:
    return ExpertFacts(num_layers=5, layers=[1, 3, 4], num_experts=num_experts, top_k=2)


def pool(num_experts: int = 200) -> RoutePool:
    return RoutePool(facts(num_experts), num_pages=6, page_size=PAGE, device=CPU)


def write(found: RoutePool, slots: list[int], ids_TLK: np.ndarray) -> None:
    step = found.step(torch.tensor(slots))
    for place, layer in enumerate(facts().layers):
        step.take(layer, torch.from_numpy(ids_TLK[:, place]).to(torch.int32))


def read(found: RoutePool, *reads: tuple[list[int], int, int]) -> np.ndarray:
    asked = [RouteRead(pages=np.array(p, np.int32), start=s, count=n) for p, s, n in reads]
    return found.read(asked).numpy()


def ids(count: int, num_experts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_experts, (count, 3, 2))


@pytest.mark.parametrize("num_experts", [8, 255, 256, 40_000, 65_535])
def test_what_was_written_is_read_by_page(num_experts: int) -> None:
    found, written = pool(num_experts), ids(8, num_experts)
    write(found, [12, 13, 14, 15, 0, 1, 2, 3], written)
    routes = read(found, ([3, 0], 1, 6), ([0], 3, 1))
    assert routes.dtype == (np.uint8 if num_experts <= 255 else np.uint16)
    np.testing.assert_array_equal(routes, np.concatenate((written[1:7], written[7:])))


@pytest.mark.parametrize("num_experts", [255, 256])
def test_a_row_that_fills_a_graph_has_no_route(num_experts: int) -> None:
    found, written = pool(num_experts), ids(2, num_experts)
    written[1] = -1
    write(found, [0, 1], written)
    routes = read(found, ([0], 0, 2))
    np.testing.assert_array_equal(routes[0], written[0])
    assert (routes[1] == np.iinfo(routes.dtype).max).all()
    assert (facts(num_experts).absent(1) == routes[1]).all()


def test_a_later_step_writes_over_rejected_tokens() -> None:
    found, first, second = pool(), ids(4, 200), ids(2, 200, seed=1)
    write(found, [4, 5, 6, 7], first)
    write(found, [6, 7], second)
    np.testing.assert_array_equal(read(found, ([1], 0, 4)), np.concatenate((first[:2], second)))


def test_a_copied_page_has_the_routes_of_its_source() -> None:
    found, written = pool(), ids(8, 200)
    write(found, list(range(8)), written)
    found.copy(torch.tensor([0, 1]), torch.tensor([4, 0]))
    np.testing.assert_array_equal(read(found, ([4, 0, 1], 0, 12))[:8], written)
    np.testing.assert_array_equal(read(found, ([0], 0, 4)), written[4:])


def test_a_step_that_ends_before_its_last_layer_stores_nothing() -> None:
    found = pool()
    step = found.step(torch.tensor([0]))
    step.take(1, torch.tensor([[3, 4]], dtype=torch.int32))
    assert not found.tensor.any()


@pytest.mark.parametrize(("num_experts", "num_bytes"), [(128, 1), (255, 1), (256, 2)])
def test_bytes_of_a_page(num_experts: int, num_bytes: int) -> None:
    assert route_dtype(num_experts).itemsize == num_bytes
    found = pool(num_experts)
    assert route_page_bytes(facts(num_experts), PAGE) == 4 * 3 * 2 * num_bytes
    assert 6 * route_page_bytes(facts(num_experts), PAGE) == found.tensor.nbytes

"""Payloads of the dialects load; everything else is refused by name."""

import io
import os
import pickle
import random
import types
from collections import OrderedDict
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from engine.errors import InvalidRequest
from engine.weights.unpickle import LocalSerializedTensor, NcclUniqueId, restricted_loads
from tests.helpers.foreign_classes import foreign_classes


@pytest.fixture
def foreign() -> Iterator[types.SimpleNamespace]:
    with foreign_classes() as found:
        yield found


def test_a_bucket(foreign: types.SimpleNamespace) -> None:
    flat = torch.arange(16, dtype=torch.uint8)
    one = foreign.FlattenedTensorMetadata("a.weight", torch.Size([2, 2]), torch.float16, 0, 8, 4)
    two = foreign.FlattenedTensorMetadata("b.weight", torch.Size([2]), torch.float32, 8, 16, 2)
    payload = pickle.dumps({"flattened_tensor": flat, "metadata": [one, two]})
    found = restricted_loads(payload)
    assert torch.equal(found["flattened_tensor"], flat)
    first, second = found["metadata"]
    assert (first.name, first.shape, first.dtype) == ("a.weight", (2, 2), torch.float16)
    assert (second.start_idx, second.end_idx, second.numel) == (8, 16, 2)
    assert type(first).__module__ == "engine.weights.unpickle"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_named_tensors_of_any_layout(dtype: torch.dtype, protocol: int) -> None:
    base = torch.arange(24).to(dtype).reshape(4, 6)
    tensors = [("plain", base), ("view", base[1:, ::2]), ("empty", base[:0])]
    found = restricted_loads(pickle.dumps(tensors, protocol=protocol))
    for (name, tensor), (found_name, found_tensor) in zip(tensors, found, strict=True):
        assert name == found_name
        assert found_tensor.dtype == dtype
        assert torch.equal(found_tensor, tensor)


def test_parameters_come_as_plain_tensors() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    found = restricted_loads(pickle.dumps(OrderedDict(weight=weight)))
    assert torch.equal(found["weight"], torch.ones(3))
    assert not found["weight"].requires_grad


def test_one_payload_a_rank(foreign: types.SimpleNamespace) -> None:
    inner = [pickle.dumps(torch.full((2,), float(rank))) for rank in range(2)]
    payload = pickle.dumps([("w", foreign.LocalSerializedTensor(inner))])
    ((name, found),) = restricted_loads(payload)
    assert name == "w"
    assert isinstance(found, LocalSerializedTensor)
    assert torch.equal(restricted_loads(found.values[1]), torch.ones(2))


def test_an_nccl_id(foreign: types.SimpleNamespace) -> None:
    own = foreign.ncclUniqueId()
    for index in range(128):
        own.internal[index] = index - 64
    found = restricted_loads(pickle.dumps(own))
    assert found == NcclUniqueId(bytes(own))


class Gadget:
    """Pickles as a call of `function`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self._call


@pytest.mark.parametrize(
    "function,arguments,name",
    [
        (os.system, ("true",), "posix.system"),
        (eval, ("1",), "builtins.eval"),
        (getattr, ("text", "format"), "builtins.getattr"),
        (__import__, ("os",), "builtins.__import__"),
        (torch.load, ("/nowhere",), "torch.serialization.load"),
        (pickle.loads, (b"",), "_pickle.loads"),
        (os.open, ("/etc/hostname", 0), "posix.open"),
    ],
)
def test_gadgets_are_refused_by_name(
    function: object, arguments: tuple[object, ...], name: str
) -> None:
    with pytest.raises(InvalidRequest, match="not on the list") as caught:
        restricted_loads(pickle.dumps([("w", Gadget(function, *arguments))]))
    assert caught.value.field == name


def test_a_dotted_name_does_not_reach_through_a_module_on_the_list() -> None:
    payload = b"\x80\x04\x8c\x05torch\x8c\x0dstorage.io.os\x93."
    with pytest.raises(InvalidRequest, match="not on the list") as caught:
        restricted_loads(payload)
    assert caught.value.field == "torch.storage.io.os"


def test_a_name_of_a_trainer_that_is_not_on_the_list(foreign: types.SimpleNamespace) -> None:
    payload = b"\x80\x04\x8c\x0csglang.utils\x8c\x06system\x93."
    with pytest.raises(InvalidRequest, match=r"sglang\.utils\.system"):
        restricted_loads(payload)


def test_a_storage_that_hides_a_pickle_of_its_own() -> None:
    """torch's own `_load_from_bytes` would read the inner bytes without any list."""
    inner = io.BytesIO()
    torch.save(Gadget(os.system, "true"), inner)
    payload = pickle.dumps(Gadget(torch.storage._load_from_bytes, inner.getvalue()))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        restricted_loads(payload)


@pytest.mark.parametrize(
    "payload",
    [
        # State for a function: {"__defaults__": 1} onto torch.Size's stand-in.
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93}\x8c\x0c__defaults__K\x01sb.",
        # State for a class, not an instance of it.
        b"\x80\x04\x8c\x06sglang\x8c\x15LocalSerializedTensor\x93}\x8c\x06valuesK\x01sb.",
        # An instance with a field the class has not.
        b"\x80\x04\x8c\x06sglang\x8c\x15LocalSerializedTensor\x93)\x81}\x8c\x03oddK\x01sb.",
        # An instance of what is only a name.
        b"\x80\x04\x8c\x05torch\x8c\x06Tensor\x93)\x81.",
        # A call of what is only a name.
        b"\x80\x04\x8c\x05torch\x8c\x06Tensor\x93)R.",
        # An object of another process.
        b"\x80\x04\x8c\x01xQ.",
        # An old opcode that builds an instance by name.
        b"(cposix\nsystem\no.",
        b"",
        b"\x80\x04",
        b"not a pickle",
    ],
)
def test_tricks_and_broken_payloads(payload: bytes) -> None:
    with pytest.raises(InvalidRequest):
        restricted_loads(payload)
    assert restricted_loads(pickle.dumps(torch.Size([2]))) == (2,)


@pytest.mark.parametrize(
    "offset,size,stride", [(0, (1000,), (1,)), (1, (4,), (1,)), (3, (2,), (-1,)), (-1, (2,), (1,))]
)
def test_a_tensor_outside_its_storage(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    storage = torch.zeros(4).untyped_storage()
    rebuild = torch._utils._rebuild_tensor_v2
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    payload = pickle.dumps(Gadget(rebuild, typed, offset, size, stride, False, OrderedDict()))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        restricted_loads(payload)


@pytest.mark.parametrize("opcode", [pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8])
def test_no_memory_is_taken_for_bytes_that_are_not_there(opcode: bytes) -> None:
    claimed = pickle.PROTO + b"\x05" + opcode + (1 << 45).to_bytes(8, "little") + b"abc."
    with pytest.raises(InvalidRequest, match="cannot be read"):
        restricted_loads(claimed)


def test_a_bytearray_that_is_there_is_read() -> None:
    assert restricted_loads(pickle.dumps(bytearray(b"abc"), 5)) == b"abc"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(6))
def test_payloads_with_broken_bytes_are_refused_and_nothing_else(protocol: int) -> None:
    draw = random.Random(protocol)
    named = pickle.dumps([("a", torch.ones(2))], protocol)
    plain = pickle.dumps({"a": [1, 2.5, "x", b"y", None, True, {1: 2}]}, protocol)
    refused = 0
    for _ in range(3000):
        data = bytearray(draw.choice((named, plain)))
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            restricted_loads(bytes(data[: draw.randint(1, 2 * len(data))]))
        except InvalidRequest:
            refused += 1
    assert refused > 1000


def test_memory_of_another_process_is_refused_on_a_cpu() -> None:
    payload = bytes(ForkingPickler.dumps([("w", torch.ones(4))]))
    with pytest.raises(InvalidRequest, match="not on the list"):
        restricted_loads(payload)


def test_a_gpu_that_this_rank_does_not_see() -> None:
    rebuild = torch.multiprocessing.reductions.rebuild_cuda_tensor
    arguments = (torch.Tensor, (1,), (1,), 0, torch.storage.TypedStorage, torch.float32)
    arguments += ("GPU-0", b"h", 4, 0, False, b"r", 0, b"e", False)
    with pytest.raises(InvalidRequest, match="does not see") as caught:
        restricted_loads(pickle.dumps(Gadget(rebuild, *arguments)))
    assert caught.value.field == "device"

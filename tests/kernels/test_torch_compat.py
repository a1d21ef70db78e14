"""Every private entry of torch, pickle and the interpreter that we use: it is there, on the torch
at hand, and does what we need of it."""

from __future__ import annotations

import ast
import inspect
import io
import math
import pickle
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from kernels import torch_compat as compat

pytestmark = pytest.mark.slow

ROOT = Path(compat.__file__).resolve().parents[1]
PACKAGES = ("rollout", "engine", "kernels", "trainer_bridge", "recipes")
LIMIT = timedelta(seconds=30)
OF_OTHERS = {
    # Of FlashInfer: where a captured step finds the plan of each replay.
    ("engine/attention/flashinfer.py", "_plan_info"),
    # Of transformers: which modules a model must not be split inside.
    ("recipes/trainers/fsdp.py", "_no_split_modules"),
    # Of the interpreter: what a process that leaves without tearing down has yet to run.
    ("rollout/replica/leave.py", "_run_exitfuncs"),
}


def test_stores_are_those_of_torch_distributed() -> None:
    for name in ("FileStore", "HashStore", "PrefixStore", "Store", "TCPStore"):
        assert getattr(compat, name) is getattr(dist, name)
    keys = compat.PrefixStore("a", compat.HashStore())
    keys.set("key", "value")
    assert keys.get("key") == b"value" and keys.check(["key"])


def on_two_ranks(path: Path, run) -> list:
    """What `run(group, rank)` returns on each of two ranks, which are threads."""
    found: dict[int, object] = {}

    def one(rank: int) -> None:
        store = compat.FileStore(str(path), 2)
        group = compat.gloo_backend(store, rank, 2, hostname="127.0.0.1", timeout=LIMIT)
        found[rank] = run(group, rank)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(2)]


def test_ranks_meet_over_gloo_and_gather(tmp_path: Path) -> None:
    def gather(group, rank: int) -> list[int]:
        out, options = torch.empty(6, dtype=torch.int64), compat.AllgatherOptions()
        options.timeout = LIMIT
        compat.all_gather_flat(group, out, torch.full((3,), rank + 1), options).wait()
        return out.tolist()

    assert on_two_ranks(tmp_path / "meet", gather) == [[1, 1, 1, 2, 2, 2]] * 2


def test_a_rank_that_does_not_come_is_an_error_in_time(tmp_path: Path) -> None:
    store, limit = compat.FileStore(str(tmp_path / "meet"), 2), timedelta(seconds=1)
    with pytest.raises(RuntimeError):
        compat.gloo_backend(store, 0, 2, hostname="127.0.0.1", timeout=limit)


def test_collectives_can_be_queued_on_the_current_stream() -> None:
    for options in (compat.AllgatherOptions(), compat.AllreduceOptions()):
        options.asyncOp = False
        assert options.asyncOp is False


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch was built without NCCL")
def test_nccl_takes_a_timeout_and_a_device() -> None:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = LIMIT
    assert options._timeout == LIMIT
    assert callable(dist.ProcessGroupNCCL.eager_connect_single_device)


def test_storages_can_be_shared_between_processes_of_a_gpu() -> None:
    """What it does is held on a GPU by the tests of the transport."""
    storage = torch.zeros(1).untyped_storage()
    assert callable(storage._share_cuda_) and callable(torch.UntypedStorage._new_shared_cuda)


def test_a_weak_reference_ends_with_the_memory() -> None:
    tensor = torch.zeros(4)
    reference = compat.weakly(tensor.untyped_storage())
    other = tensor.view(2, 2)
    assert reference.cdata == compat.weakly(other.untyped_storage()).cdata
    del tensor
    assert not reference.expired()
    del other
    assert reference.expired()


def test_a_tensor_is_made_of_a_typed_storage_without_a_warning() -> None:
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.arange(6.0).untyped_storage(), dtype=torch.float32, _internal=True
    )
    assert compat.storage_bytes(storage) == 24
    made = compat.rebuild_tensor(storage, 1, (2, 2), (2, 1))
    assert made.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_tensor_of_shared_gpu_memory_is_made_of_the_arguments_that_its_pickle_has() -> None:
    from torch.multiprocessing import reductions

    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names == [
        "tensor_cls",
        "tensor_size",
        "tensor_stride",
        "tensor_offset",
        "storage_cls",
        "dtype",
        "storage_device",
        "storage_handle",
        "storage_size_bytes",
        "storage_offset_bytes",
        "requires_grad",
        "ref_counter_handle",
        "ref_counter_offset",
        "event_handle",
        "event_sync_required",
    ]


def test_opcodes_of_the_unpickler_in_python_can_be_refused() -> None:
    class Reader(compat.PythonUnpickler):
        dispatch = dict(compat.PythonUnpickler.dispatch)

        def refuse(self) -> None:
            raise pickle.UnpicklingError("refused")

        dispatch[pickle.REDUCE[0]] = refuse

    assert Reader(io.BytesIO(pickle.dumps([1, {"a": b"x"}]))).load() == [1, {"a": b"x"}]
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        Reader(io.BytesIO(pickle.dumps(complex(1, 2)))).load()


def test_a_parameter_shares_its_memory_and_takes_no_gradient() -> None:
    class Own(torch.nn.Parameter):
        pass

    data = torch.zeros(3)
    made = compat.parameter_of(Own, data)
    assert type(made) is Own and made.data_ptr() == data.data_ptr() and not made.requires_grad
    holder = torch.nn.Module()
    holder.weight = made
    assert list(holder.parameters()) == [made]


def test_the_part_of_a_sharded_tensor() -> None:
    code = (
        "import torch, torch.distributed as dist\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.tensor import Shard, distribute_tensor\n"
        "from kernels.torch_compat import HashStore, local_part\n"
        "dist.init_process_group('gloo', store=HashStore(), rank=0, world_size=1)\n"
        "mesh = init_device_mesh('cpu', (1,))\n"
        "print(local_part(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])))\n"
        "dist.destroy_process_group()\n"
    )
    assert run_python(code) == "((4, 3), (0, 0))"


def test_attention_on_a_cpu_and_its_normaliser() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 16).unbind(0)
    bias = torch.randn(1, 1, 5, 5)
    out, lse = compat.flash_attention_cpu(q, k, v, bias, 0.5)
    scores = q.double() @ k.double().transpose(-1, -2) * 0.5 + bias.double()
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_many_tensors_are_copied_and_read_at_once() -> None:
    sources = [torch.randn(3), torch.randn(2, 2), torch.tensor([1.0, math.nan])]
    targets = [torch.zeros_like(source) for source in sources]
    compat.copy_together(targets, sources)
    assert all(torch.equal(a[:1], b[:1]) for a, b in zip(targets, sources, strict=True))
    peaks = compat.largest_magnitudes(sources)
    assert [float(peak) for peak in peaks[:2]] == [float(s.abs().max()) for s in sources[:2]]
    assert peaks[2].isnan()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_integers_are_multiplied(device: str) -> None:
    x = torch.arange(32 * 16, device=device).view(32, 16) % 7 - 3
    weight = torch.arange(8 * 16, device=device).view(8, 16) % 5 - 2
    found = compat.int8_product(x.to(torch.int8), weight.to(torch.int8))
    assert found.dtype == torch.int32
    assert found.tolist() == (x.cpu() @ weight.cpu().T).tolist()


def test_what_is_kept_for_ever_is_never_destructed() -> None:
    code = (
        "import gc, weakref\n"
        "from kernels.torch_compat import keep_for_ever\n"
        "class Thing: pass\n"
        "def kept(keep):\n"
        "    thing = Thing(); keep(thing); seen = weakref.ref(thing)\n"
        "    del thing; gc.collect(); return seen() is not None\n"
        "print(kept(keep_for_ever), kept(lambda thing: None))\n"
    )
    assert run_python(code) == "True False"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def private_names(path: Path) -> set[str]:
    """Private modules that a file imports, and private attributes it reads or sets of what is
    not its own: no `self`, and defined nowhere in it."""
    tree = ast.parse(path.read_text())
    found, own = set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)):
                names = [*module.split("."), *(alias.name for alias in node.names)]
                found.update(name for name in names if is_private(name))
            case ast.Import():
                parts = [part for alias in node.names for part in alias.name.split(".")]
                found.update(filter(is_private, parts))
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                own.add(node.name)
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                own.add(node.attr)
            case ast.Name(ctx=ast.Store()):
                own.add(node.id)
            case ast.Attribute(value=ast.Name(id="os"), attr="_exit"):
                pass  # documented for all that its name says otherwise
            case ast.Attribute() if is_private(node.attr):
                found.add(node.attr)
    return found - own


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_other_file_names_what_is_private_elsewhere() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != Path(compat.__file__).resolve()
        for name in private_names(path)
    }
    assert found == OF_OTHERS
    assert "_share_cuda_" in private_names(Path(compat.__file__))


def test_the_host_has_no_memory_left() -> None:
    with pytest.raises(RuntimeError) as host:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert compat.ran_out_of_memory(host.value)
    assert compat.ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not compat.ran_out_of_memory(RuntimeError("CUDA error: misaligned address"))


def test_symmetric_memory_is_refused_by_an_error_where_there_is_none() -> None:
    """Which whoever asks understands; on GPUs it is `tests/kernels/collectives` that maps it."""
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(RuntimeError):
        compat.symmetric_empty(4, torch.device("cuda", 0))
    store = compat.HashStore()
    with pytest.raises(RuntimeError):
        compat.map_symmetric(torch.zeros(4, dtype=torch.int32), "nobody", store, 0, 1)
    compat.unmap_symmetric("nobody")
    with pytest.raises(RuntimeError):
        compat.map_symmetric(torch.zeros(4, dtype=torch.int32), "nobody", store, 0, 1)
    compat.unmap_symmetric("nobody")


def test_sums_of_rows_are_asked_of_the_back_end() -> None:
    group, options = Mock(), compat.ReduceScatterOptions()
    out, x = torch.zeros(1), torch.zeros(2)
    assert compat.reduce_scatter_flat(group, out, x, options) is (
        group._reduce_scatter_base.return_value
    )
    group._reduce_scatter_base.assert_called_once_with(out, x, options)
    assert hasattr(dist.ProcessGroupGloo, "_reduce_scatter_base")
    assert hasattr(options, "asyncOp")

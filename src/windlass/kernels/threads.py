"""Runs a kernel's tasks on the threads of PyTorch's own pool.

PyTorch's operators run on GNU OpenMP.  A second pool would fight with it: its threads spin for a while after
each operator and would keep ours from their cores.  So the tasks are handed to the same library: `fork` is
`GOMP_parallel(function, data, num_threads, flags)`, the entry point behind every `#pragma omp parallel`, which
the OpenMP libraries of LLVM and Intel have too.  Where there is none, plain Python threads stand in.

Tasks are taken one by one from a shared counter.  Every task writes its own part of the result in a fixed
order, so the bits depend neither on the number of threads nor on who took what.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels.jit import DISABLED, FEATURES

SYMBOL = "windlass_fork"
_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_FORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that this process has loaded, or can load."""
    names = ["libgomp.so.1", "libomp.so", "libiomp5.so", "libomp.dylib"]
    maps = Path("/proc/self/maps")
    if maps.exists():
        loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line.rsplit("/", 1)[-1]}
        names = sorted(path for path in loaded if path.startswith("/")) + names
    for name in names:
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


@_FORK
def _fork_python(function: int, data: int, num_threads: int, flags: int) -> None:
    """GOMP_parallel in Python threads."""
    task = _TASK(function)
    workers = [threading.Thread(target=task, args=(data,)) for _ in range(num_threads - 1)]
    for worker in workers:
        worker.start()
    task(data)
    for worker in workers:
        worker.join()


llvmlite.binding.add_symbol(SYMBOL, _openmp() or ctypes.cast(_fork_python, ctypes.c_void_p).value or 0)

_i32, _i64, _i8p = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


@intrinsic
def _parallel_for(typing_context, body, num_tasks, num_threads, arguments):
    """Calls body(task, thread, *arguments) for every task."""
    inner = body.get_call_type(typing_context, (types.int64, types.int64, *arguments.types), {})

    def generate(context, builder, signature, values):
        compiled = body.dispatcher.get_compile_result(inner)
        context.add_linking_libs([compiled.library])
        _, tasks, threads, packed = values
        shared_type = ir.LiteralStructType([_i64, _i64, _i64, packed.type])
        shared = _alloca(builder, shared_type)
        zero = ir.Constant(_i64, 0)
        for index, value in enumerate((zero, zero, tasks, packed)):
            builder.store(value, _field(builder, shared, index))
        outlined = _outlined(context, builder.module, compiled.fndesc, inner, arguments, shared_type)
        fork_type = ir.FunctionType(ir.VoidType(), [_i8p, _i8p, _i32, _i32])
        fork = builder.module.globals.get(SYMBOL) or ir.Function(builder.module, fork_type, SYMBOL)
        with builder.if_else(builder.icmp_signed(">", threads, ir.Constant(_i64, 1))) as (several, one):
            with several:
                arguments_ = [builder.bitcast(outlined, _i8p), builder.bitcast(shared, _i8p)]
                builder.call(fork, [*arguments_, builder.trunc(threads, _i32), ir.Constant(_i32, 0)])
            with one:
                builder.call(outlined, [builder.bitcast(shared, _i8p)])
        return context.get_dummy_value()

    return types.void(body, types.int64, types.int64, arguments), generate


def _outlined(context, module, descriptor, signature, arguments, shared_type):
    """The function of one thread: takes a number, then tasks until there are none, without denormals."""
    name = module.get_unique_name("windlass_thread")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_i8p]), name)
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    shared = builder.bitcast(function.args[0], shared_type.as_pointer())
    one = ir.Constant(_i64, 1)
    thread = builder.atomic_rmw("add", _field(builder, shared, 1), one, "monotonic")
    tasks = builder.load(_field(builder, shared, 2))
    packed = builder.load(_field(builder, shared, 3))
    restore = _without_denormals(builder)
    head, work, leave = (function.append_basic_block(part) for part in ("head", "work", "leave"))
    builder.branch(head)
    builder.position_at_end(head)
    task = builder.atomic_rmw("add", _field(builder, shared, 0), one, "monotonic")
    builder.cbranch(builder.icmp_signed("<", task, tasks), work, leave)
    builder.position_at_end(work)
    values = [builder.extract_value(packed, i) for i in range(len(arguments.types))]
    context.call_internal_no_propagate(builder, descriptor, signature, [task, thread, *values])
    builder.branch(head)
    builder.position_at_end(leave)
    restore()
    builder.ret_void()
    return function


def _without_denormals(builder: ir.IRBuilder) -> Callable[[], None]:
    """Sets flush-to-zero and denormals-are-zero (x86); gives what puts the register back."""
    if "sse" not in FEATURES and "avx2" not in FEATURES:
        return lambda: None
    kind = ir.FunctionType(ir.VoidType(), [_i8p])
    store, load = (
        builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        for name in ("llvm.x86.sse.stmxcsr", "llvm.x86.sse.ldmxcsr")
    )
    before, changed = _alloca(builder, _i32), _alloca(builder, _i32)
    builder.call(store, [builder.bitcast(before, _i8p)])
    builder.store(builder.or_(builder.load(before), ir.Constant(_i32, 0x8040)), changed)
    builder.call(load, [builder.bitcast(changed, _i8p)])
    return lambda: builder.call(load, [builder.bitcast(before, _i8p)])


def _field(builder: ir.IRBuilder, struct: Any, index: int) -> Any:
    return builder.gep(struct, [ir.Constant(_i32, 0), ir.Constant(_i32, index)])


def _alloca(builder: ir.IRBuilder, kind: Any) -> Any:
    """Memory on the stack, taken once at the function's entry (not once per iteration of a loop)."""
    with builder.goto_entry_block():
        return builder.alloca(kind)


def _parallel_for_python(
    body: Callable[..., None], num_tasks: int, num_threads: int, arguments: tuple[Any, ...]
) -> None:
    for task in range(num_tasks):
        body(task, task % num_threads, *arguments)


parallel_for: Callable[..., None] = _parallel_for_python if DISABLED else _parallel_for
"""parallel_for(body, num_tasks, num_threads, arguments) calls body(task, thread, *arguments) for every task."""

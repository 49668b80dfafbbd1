"""Reading pickles without running them: an interpreter of the pickle opcodes that knows data and tensors, nothing else.

`pickle.Unpickler` imports and calls whatever a file names. This interpreter cannot: a global is a name, an object is
a `PickledObject` (name, arguments, state), a tensor is a `TensorMeta` that says where its bytes lie. The few calls
that it understands are the rows of `_BUILDERS`. A file that would have called anything but a class of a library or of
the training code is refused by name (`UnsafePickleError`), so that its owner learns about it.
"""

from __future__ import annotations

import pickletools
import struct
import sys
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_PICKLE_BYTES = 64 << 20  # the index of a checkpoint with optimiser states of 10,000 tensors takes a tenth of this
MAX_OPCODES = 5_000_000
MAX_EXPANDED_NUMEL = 1 << 24  # items of a tensor that repeats its storage (stride 0), lest a few bytes fill memory

# Classes of the standard library that Lightning checkpoints hold as plain settings; they become inert objects.
_HARMLESS_STDLIB = ("collections.", "datetime.", "decimal.", "fractions.", "pathlib.", "typing.", "enum.", "uuid.")
_HARMLESS_CALLS = {
    *("argparse.Namespace", "types.SimpleNamespace", "functools.partial"),
    *(f"builtins.{name}" for name in ("range", "slice", "complex", "bytearray", "bytes", "str", "object")),
    *("torch.device", "torch.dtype", "numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *(f"numpy.random._pickle.__{kind}_ctor" for kind in ("randomstate", "generator", "bit_generator")),
}
_DAMAGE = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(struct.error, MemoryError, RecursionError),
)
# Pickles of the usual protocol 2 name the standard library's modules as Python 2 did.
_STDLIB = sys.stdlib_module_names | set(IMPORT_MAPPING)

_STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
ITEM_SIZES = {
    **dict.fromkeys(["float64", "int64", "uint64", "complex64"], 8),
    **dict.fromkeys(["float32", "int32", "uint32"], 4),
    **dict.fromkeys(["float16", "bfloat16", "int16", "uint16"], 2),
    **dict.fromkeys(["int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"], 1),
    "complex128": 16,
}


class BrokenPickleError(ValueError):
    """The bytes are no complete pickle, or describe tensors that cannot exist."""


class UnsafePickleError(ValueError):
    """Unpickling the file in the usual way would call a function that does more than hold data."""


class Stream(Protocol):
    """What the interpreter reads from; `read` and `readline` refuse to run past a limit of their own."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes."""

    def readline(self) -> bytes:
        """The bytes up to and with the next newline."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to; never imported."""

    path: str


@dataclass(eq=False, repr=False)
class PickledObject:
    """An object of some class that was not built: the class's dotted name and what the pickle says about it."""

    type: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageRef:
    """One block of numbers in the file: its dtype, its key there, the number of items."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class TensorMeta:
    """A tensor as the pickle describes it; `offset` and `stride` count items of `dtype` in the storage."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(stream: Stream) -> Any:
    """Interpret one pickle from `stream` and leave the stream right behind it.

    Returns nested dicts, lists, tuples, strings, numbers, `TensorMeta` and `PickledObject`.
    Raises `UnsafePickleError` or `BrokenPickleError`.
    """
    machine = _Machine()
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if count > MAX_OPCODES:
                raise BrokenPickleError(f"its index has more than {MAX_OPCODES:,} entries")
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise BrokenPickleError(f"its index uses the pickle opcode {opcode.name}, which no checkpoint needs")
            handler(machine, arg)
        return machine.stack[-1]
    except (BrokenPickleError, UnsafePickleError):
        raise
    except _DAMAGE as error:
        raise BrokenPickleError("its index is cut off or damaged") from error


def _check_size(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > 64:
        raise BrokenPickleError("a tensor's shape is no list of numbers")
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in value):
        raise BrokenPickleError("a tensor's shape is no list of numbers")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str | None = None) -> TensorMeta:
    if not isinstance(storage, StorageRef):
        raise BrokenPickleError("a tensor has no storage")
    shape, stride = _check_size(shape), _check_size(stride)
    (offset,) = _check_size((offset,))
    if len(shape) != len(stride):
        raise BrokenPickleError("a tensor's shape and strides disagree")
    dtype = dtype or storage.dtype
    available = storage.numel * ITEM_SIZES[storage.dtype] // ITEM_SIZES[dtype]
    numel = 1
    for n in shape:
        numel *= n
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if numel else -1
    if last >= available or numel > max(available, MAX_EXPANDED_NUMEL):
        raise BrokenPickleError(f"a tensor of shape {shape} reaches past its storage of {available} items")
    return TensorMeta(storage, dtype, offset, shape, stride)


def _rebuild_v2(args: tuple[Any, ...]) -> Any:
    return _tensor(*args[:4])


def _rebuild_v3(args: tuple[Any, ...]) -> Any:
    dtype = args[6].path.removeprefix("torch.")
    if dtype not in ITEM_SIZES:
        raise BrokenPickleError(f"a tensor has the unknown type {dtype}")
    storage, offset, shape, stride = args[:4]
    return _tensor(storage, offset, shape, stride, dtype)


def _rebuild_from_type(args: tuple[Any, ...]) -> Any:
    return _call(args[0], tuple(args[2]))


def _encode(args: tuple[Any, ...]) -> Any:
    text, encoding = args
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise BrokenPickleError("its index holds bytes in an unknown encoding")
    return text.encode(encoding)


def _as_list(args: tuple[Any, ...]) -> list[Any]:
    return list(args[0]) if args else []


def _as_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return {_key(k): v for k, v in pairs}


_TORCHSCRIPT_VALUES = ("restore_type_tag", "build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_v2,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": lambda args: args[0],
    "torch._utils._rebuild_parameter_with_state": lambda args: args[0],
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": lambda args: tuple(args[0]) if args else (),
    **{f"torch.jit._pickle.{name}": lambda args: args[0] for name in _TORCHSCRIPT_VALUES},
    "collections.OrderedDict": _as_dict,
    "collections.defaultdict": lambda args: {},
    "_codecs.encode": _encode,
    **{f"{module}.{name}": _as_list for module in ("builtins", "__builtin__") for name in ("list", "set", "frozenset")},
    **{f"{module}.dict": _as_dict for module in ("builtins", "__builtin__")},
    **{f"{module}.tuple": lambda args: tuple(_as_list(args)) for module in ("builtins", "__builtin__")},
    **{f"{module}._reconstructor": lambda args: _call(args[0], ()) for module in ("copyreg", "copy_reg")},
}


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise BrokenPickleError("its index calls something that has no name")
    path = function.path
    if path in _BUILDERS:
        return _BUILDERS[path](args)
    name = path.rpartition(".")[2]
    is_class = name.lstrip("_")[:1].isupper()
    if path.startswith("torch._utils._rebuild_") or path in _HARMLESS_CALLS or path.startswith(_HARMLESS_STDLIB):
        return PickledObject(path, args)
    if not is_class or path.partition(".")[0] in _STDLIB:
        raise UnsafePickleError(f"it would call {path} when unpickled")
    return PickledObject(path, args)


def _key(value: Any) -> Any:
    """A dict key that is safe to hash: hashing a tuple nested a million deep would overflow the C stack."""
    if isinstance(value, (str, int, float, bytes, type(None))):
        return value
    return value.path if isinstance(value, Global) else PickledObject("key", (value,))


def _persistent(reference: Any) -> Any:
    """The storage that torch.save's persistent id `("storage", type, key, location, numel, ...)` stands for."""
    if isinstance(reference, tuple) and reference[0] == "module":  # a class, with its source code, in old files
        return reference[1]
    kind, storage_type, key, _, numel = reference[:5]
    dtype = _STORAGE_DTYPES.get(storage_type.path.rpartition(".")[2])
    if kind != "storage" or dtype is None or not isinstance(key, str | int):
        raise BrokenPickleError(f"its index has a nameless storage or the unknown type {storage_type.path}")
    if len(reference) > 5 and reference[5] is not None:
        raise BrokenPickleError("it holds storage views, which only torch before 0.4 wrote")
    return StorageRef(dtype, str(key), _check_size((numel,))[0])


class _Machine:
    """The pickle virtual machine: a stack, the stacks below each mark, a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_copy(self, value: Any) -> None:
        """Push what was built out of values on the stack: a few bytes can ask for the same long copy many times."""
        if isinstance(value, (str, bytes, list, tuple, dict)):
            self.copied += len(value) if isinstance(value, (str, bytes)) else 16 * len(value)
        if self.copied > MAX_PICKLE_BYTES:
            raise BrokenPickleError(f"its index grows to more than {MAX_PICKLE_BYTES >> 20} MB when read")
        self.push(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop_any(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def push_tuple(self, count: int) -> None:
        items = self.stack[len(self.stack) - count :]
        if len(items) != count:
            raise BrokenPickleError("its index is cut off or damaged")
        del self.stack[len(self.stack) - count :]
        self.push(tuple(items))

    def push_dict(self, _: Any) -> None:
        items = self.pop_mark()
        self.push({_key(k): v for k, v in zip(items[::2], items[1::2], strict=True)})

    def extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def append(self, _: Any) -> None:
        item = self.pop()
        self.extend([item])

    def extend_marked(self, _: Any) -> None:
        items = self.pop_mark()
        self.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, PickledObject):
            target = target.items
        if isinstance(target, dict):
            target.update((_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True))

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def set_marked(self, _: Any) -> None:
        items = self.pop_mark()
        self.set_items(items)

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise BrokenPickleError("its index is cut off or damaged")
        if len(module) + len(name) > 4096:
            raise BrokenPickleError("it names a class with more than 4,096 letters")
        self.push(Global(f"{module}.{name}"))

    def reduce(self, _: Any) -> None:
        args, function = self.pop(), self.pop()
        self.push_copy(_call(function, args))

    def new_with_keywords(self, _: Any) -> None:
        self.pop()
        self.reduce(None)

    def instance(self, path: str) -> None:
        args = tuple(self.pop_mark())
        self.push_copy(_call(Global(path.replace(" ", ".")), args))

    def obj(self, _: Any) -> None:
        function, *args = self.pop_mark()
        self.push_copy(_call(function, tuple(args)))

    def build(self, _: Any) -> None:
        state = self.pop()
        if isinstance(self.stack[-1], PickledObject):
            self.stack[-1].state = state


_PUSH_ARGUMENT = {
    *("NONE", "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_HANDLERS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(_PUSH_ARGUMENT, _Machine.push),
    **dict.fromkeys(["PROTO", "FRAME", "STOP"], lambda machine, arg: None),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], _Machine.put),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], lambda machine, index: machine.push(machine.memo[index])),
    **dict.fromkeys(["REDUCE", "NEWOBJ"], _Machine.reduce),
    **dict.fromkeys(["LIST", "FROZENSET"], lambda machine, _: machine.push(machine.pop_mark())),
    **dict.fromkeys(["EMPTY_LIST", "EMPTY_SET"], lambda machine, _: machine.push([])),
    **dict.fromkeys(["APPENDS", "ADDITEMS"], _Machine.extend_marked),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "DICT": _Machine.push_dict,
    "APPEND": _Machine.append,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_marked,
    "MARK": _Machine.mark,
    "POP": _Machine.pop_any,
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "GLOBAL": lambda machine, path: machine.push(Global(path.replace(" ", "."))),
    "STACK_GLOBAL": _Machine.stack_global,
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "INST": _Machine.instance,
    "OBJ": _Machine.obj,
    "BUILD": _Machine.build,
    "BINPERSID": lambda machine, _: machine.push(_persistent(machine.pop())),
}

"""Read a pickle that holds plain data, without running anything that it names.

A pickle is a program. Python's own reader calls what the program names, so that a file from a stranger can do what it
likes. Here `pickletools` only splits the program into its instructions. Those that build plain data are carried out,
and arrays of numbers are built from their bytes. Any other instruction, and any other name, is an error.
"""

import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


class NotPlainError(Exception):
    """A pickle is damaged, or holds more than plain data. The message says which, in a few words."""


class PickledArray:
    """An array of numbers in a pickle."""

    def __init__(self) -> None:
        self.values: npt.NDArray[Any] = np.zeros(0)
        """empty until the pickle's state of the array was read"""


class _Dtype:
    """The type of an array's numbers: its kind and bytes are read first, then its byte order."""

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biuf][1248]", code):
            raise NotPlainError(f"an array of type {str(code)[:20]!r}")
        self.type = np.dtype(code)


class _Name:
    """One of `_NAMES`, in the place where Python would have what the name stands for."""

    def __init__(self, name: str) -> None:
        self.name = name


def read_plain_pickle(data: bytes) -> Any:
    """Return the value that a pickle of any protocol holds: None, numbers, texts, bytes, tuples, lists and dicts.

    Arrays of numbers are `PickledArray`s. Texts of Python 2 are decoded as Latin-1. Raises NotPlainError.
    """
    try:
        return _Machine().run(data)
    except NotPlainError:
        raise
    except Exception as error:  # whatever an instruction meets that the ones before it did not prepare
        raise NotPlainError(f"not a complete pickle ({str(error)[:80] or type(error).__name__})") from error


class _Machine:
    """Carries out the instructions of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                (value,) = self.stack
                return value
            if name in _PUSHED:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise NotPlainError(f"the instruction {name}")
        raise NotPlainError("it has no end")

    def pop_to_mark(self) -> list[Any]:
        """Take what was pushed since the last mark off the stack."""
        mark = self.marks.pop()
        found, self.stack[mark:] = self.stack[mark:], []
        return found

    # Instructions with their argument

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def make_list(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def make_dict(self, _: Any) -> None:
        self.stack.append(_pair_up(self.pop_to_mark()))

    def make_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        self.top(list).append(value)

    def append_all(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.top(list).extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.top(dict).update(_pair_up([key, value]))

    def set_items(self, _: Any) -> None:
        pairs = _pair_up(self.pop_to_mark())
        self.top(dict).update(pairs)

    def remember(self, place: Any) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def recall(self, place: Any) -> None:
        self.stack.append(self.memo[place])

    def look_up(self, name: Any) -> None:
        if name is None:  # the module and the name are on the stack
            attribute, module = self.stack.pop(), self.stack.pop()
            name = f"{module} {attribute}"
        if name not in _NAMES:
            raise NotPlainError(f"the name {'.'.join(name.split(' '))[:60]!r}")
        self.stack.append(_Name(name))

    def call(self, _: Any) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        builder = _BUILDERS.get(name.name) if isinstance(name, _Name) else None
        if builder is None or not isinstance(arguments, tuple):
            raise NotPlainError("a call of what is no array")
        self.stack.append(builder(*arguments))

    def set_state(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PickledArray):
            _, shape, dtype, by_columns, content = state
            target.values = _make_array(shape, dtype, "F" if by_columns else "C", content)
        elif isinstance(target, _Dtype):
            target.type = target.type.newbyteorder(state[1])
        else:
            raise NotPlainError("the state of what is no array")

    def top(self, kind: type) -> Any:
        """Return the value on top of the stack. Raises NotPlainError unless it is exactly of this kind."""
        if type(self.stack[-1]) is not kind:
            raise NotPlainError(f"a {type(self.stack[-1]).__name__} in the place of a {kind.__name__}")
        return self.stack[-1]


def _pair_up(values: list[Any]) -> dict[Any, Any]:
    keys = values[::2]
    if not all(isinstance(key, str | int | bytes) for key in keys):
        raise NotPlainError("a dict whose keys are no texts or numbers")
    return dict(zip(keys, values[1::2], strict=True))


def _make_tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def make(machine: _Machine, _: Any) -> None:
        values = machine.stack[-count:]
        if len(values) < count:
            raise NotPlainError("a tuple of too few values")
        machine.stack[-count:] = [tuple(values)]

    return make


def _make_array(shape: Any, dtype: Any, order: Any, content: Any) -> npt.NDArray[Any]:
    if isinstance(content, str):  # bytes of Python 2
        content = content.encode("latin-1")
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes | bytearray) or order not in ("C", "F"):
        raise NotPlainError("an array that is not of numbers")
    return np.frombuffer(bytes(content), dtype.type).reshape(shape, order=order)


def _start_array(*_: Any) -> PickledArray:
    return PickledArray()  # its state follows


def _read_array(content: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    array = PickledArray()
    array.values = _make_array(shape, dtype, order, content)
    return array


def _read_scalar(dtype: Any, content: Any) -> Any:
    return _make_array((), dtype, "C", content).item()


def _make_no_bytes() -> bytes:
    return b""


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise NotPlainError(f"the encoding {encoding[:20]!r}")
    return text.encode("latin-1")


_BUILDERS: dict[str, Callable[..., Any]] = {
    "numpy dtype": lambda code, *_: _Dtype(code),
    "_codecs encode": _encode,
    "__builtin__ bytes": _make_no_bytes,
    **{f"numpy.{core}.multiarray _reconstruct": _start_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray scalar": _read_scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": _read_array for core in ("core", "_core")},
}
_NAMES = {*_BUILDERS, "numpy ndarray"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark, "LIST": _Machine.make_list, "DICT": _Machine.make_dict, "TUPLE": _Machine.make_tuple,
    "TUPLE1": _make_tuple_of(1), "TUPLE2": _make_tuple_of(2), "TUPLE3": _make_tuple_of(3),
    "APPEND": _Machine.append, "APPENDS": _Machine.append_all,
    "SETITEM": _Machine.set_item, "SETITEMS": _Machine.set_items,
    "PUT": _Machine.remember, "BINPUT": _Machine.remember, "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "GET": _Machine.recall, "BINGET": _Machine.recall, "LONG_BINGET": _Machine.recall,
    "GLOBAL": _Machine.look_up, "STACK_GLOBAL": _Machine.look_up, "REDUCE": _Machine.call, "BUILD": _Machine.set_state,
}  # fmt: skip

"""A pickle executed symbolically: the same stack, mark and memo as the real one, nothing imported, nothing called.

What the real unpickler would import shows up as :class:`Global`, what it would call as :class:`Object`.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bnfix.formats.names import printable
from bnfix.formats.pickles.values import Global, Object, Persistent, Table

MAX_OPS = 2_000_000
"""Opcodes of one pickle; a large model's has some 100 000."""


def words(text: str) -> frozenset[str]:
    """The words of ``text``, as a set."""
    return frozenset(text.split())


_PUSHES_ITS_ARGUMENT = words(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES "
    "BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT"
)
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MAPPINGS = frozenset(
    [("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter"), ("builtins", "dict")]
)


@dataclass
class Pickle:
    """A pickle that was looked at. ``end`` is the offset after its STOP, ``problem`` why there is none."""

    value: Any
    names: dict[Global, None]
    end: int
    problem: str = ""
    protocol: int = 0


class LimitError(Exception):
    """A pickle with more in it than a model has."""


class _MalformedError(Exception):
    pass


def examine(data: bytes, start: int = 0) -> Pickle:
    """Go through the pickle at ``data[start:]`` up to its STOP.

    A malformed pickle is no error here: what it had named before the fault would already have been imported.

    Raises:
        LimitError: more than :data:`MAX_OPS` opcodes.
    """
    machine = _Machine()
    end = start
    try:
        for count, (op, argument, position) in enumerate(_opcodes(data, start)):
            if count >= MAX_OPS:
                raise LimitError(f"more than {MAX_OPS:,} pickle opcodes")
            end = position + 1
            if op == "STOP":
                return Pickle(machine.pop(), machine.names, end, "", machine.protocol)
            machine.step(op, argument)
    except _MalformedError as error:
        return Pickle(None, machine.names, end, printable(str(error)))
    return Pickle(None, machine.names, end, "it ends before its STOP")


def _opcodes(data: bytes, start: int) -> Iterator[tuple[str, Any, int]]:
    stream = io.BytesIO(data)
    stream.seek(start)
    steps = pickletools.genops(stream)
    while True:
        try:
            op, argument, position = next(steps)
        except StopIteration:
            return
        except (ValueError, OverflowError, UnicodeError, IndexError, KeyError, TypeError) as error:
            raise _MalformedError(str(error)) from error
        yield op.name, argument, int(position or 0)


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[Global, None] = {}
        self.copied = 0
        self.protocol = 0

    def pop(self) -> Any:
        if not self.stack:
            raise _MalformedError("it takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise _MalformedError("it takes from an empty stack")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        if not self.outer:
            raise _MalformedError("a mark is missing")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def name(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            module, name = "(computed)", "(computed)"  # a name that only running would tell
        found = Global(module, name)
        self.names[found] = None
        return found

    def step(self, op: str, argument: Any) -> None:
        if op in _PUSHES_ITS_ARGUMENT:
            self.stack.append(argument)
        elif op in _CONSTANTS:
            self.stack.append(_CONSTANTS[op])
        else:
            action = getattr(self, f"op_{op.lower()}", None)
            if action is None:
                raise _MalformedError(f"an opcode {op} that bnfix does not know")
            action(argument)

    # ------------------------------------------------------------------ stack and memo

    def op_proto(self, version: int) -> None:
        self.protocol = version

    def op_frame(self, _: Any) -> None: ...

    def op_readonly_buffer(self, _: Any) -> None: ...

    def op_next_buffer(self, _: Any) -> None:
        self.stack.append(Persistent("buffer"))

    def op_mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def op_pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def op_pop_mark(self, _: Any) -> None:
        self.since_mark()

    def op_dup(self, _: Any) -> None:
        self.stack.append(self.top())

    def op_get(self, index: int) -> None:
        if index not in self.memo:
            raise _MalformedError(f"memo {index} is empty")
        self.stack.append(self.memo[index])

    op_binget = op_long_binget = op_get

    def op_put(self, index: int) -> None:
        if not 0 <= index <= MAX_OPS:  # the real one makes room for all numbers below: gigabytes in nine bytes
            raise _MalformedError(f"it numbers a value {index:,}")
        self.memo[index] = self.top()

    op_binput = op_long_binput = op_put

    def op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.top()

    # ------------------------------------------------------------------ containers

    def op_empty_list(self, _: Any) -> None:
        self.stack.append([])

    op_empty_set = op_empty_list

    def op_list(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append(items)

    op_frozenset = op_list

    def op_append(self, _: Any) -> None:
        item = self.pop()
        self._extend(self.top(), [item])

    def op_appends(self, _: Any) -> None:
        items = self.since_mark()
        self._extend(self.top(), items)

    op_additems = op_appends

    def _extend(self, onto: Any, items: list[Any]) -> None:
        if isinstance(onto, list):
            onto.extend(items)
        elif isinstance(onto, Object):
            if onto.items is None:
                onto.items = []
            onto.items.extend(items)
        else:
            raise _MalformedError("it appends to something that is no list")

    def op_tuple(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def _tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise _MalformedError("it takes from an empty stack")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def op_tuple1(self, _: Any) -> None:
        self._tuple_of(1)

    def op_tuple2(self, _: Any) -> None:
        self._tuple_of(2)

    def op_tuple3(self, _: Any) -> None:
        self._tuple_of(3)

    def op_empty_dict(self, _: Any) -> None:
        self.stack.append(Table())

    def op_dict(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append(Table())
        self._set(items)

    def op_setitem(self, _: Any) -> None:
        value = self.pop()
        key = self.pop()
        self._set([key, value])

    def op_setitems(self, _: Any) -> None:
        self._set(self.since_mark())

    def _set(self, items: list[Any]) -> None:
        onto = self.top()
        if isinstance(onto, Object):
            if onto.table is None:
                onto.table = Table()
            onto = onto.table
        table = onto
        if not isinstance(table, Table) or len(items) % 2:
            raise _MalformedError("it sets an item of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            table[key] = value

    # ------------------------------------------------------------------ names and calls

    def op_global(self, pair: str) -> None:
        module, _, name = pair.partition(" ")
        self.stack.append(self.name(module, name))

    def op_stack_global(self, _: Any) -> None:
        name = self.pop()
        module = self.pop()
        self.stack.append(self.name(module, name))

    def op_ext1(self, code: int) -> None:
        self.stack.append(self.name("copyreg", f"extension_{code}"))

    op_ext2 = op_ext4 = op_ext1

    def op_persid(self, text: str) -> None:
        self.stack.append(Persistent(text))

    def op_binpersid(self, _: Any) -> None:
        self.stack.append(Persistent(self.pop()))

    def _call(self, made_by: Any, args: Any) -> None:
        args = args if isinstance(args, tuple) else (args,)
        if isinstance(made_by, Global) and (made_by.module, made_by.name) in _MAPPINGS:
            self.stack.append(self._table(args))
        else:
            self.stack.append(Object(made_by, args))

    def op_reduce(self, _: Any) -> None:
        args = self.pop()
        self._call(self.pop(), args)

    op_newobj = op_reduce

    def op_newobj_ex(self, _: Any) -> None:
        kwargs = self.pop()
        args = self.pop()
        made_by = self.pop()
        self.stack.append(Object(made_by, args if isinstance(args, tuple) else (args,), state=kwargs))

    def op_inst(self, pair: str) -> None:
        args = tuple(self.since_mark())
        module, _, name = pair.partition(" ")
        self._call(self.name(module, name), args)

    def op_obj(self, _: Any) -> None:
        items = self.since_mark()
        if not items:
            raise _MalformedError("it takes from an empty stack")
        self._call(items[0], tuple(items[1:]))

    def op_build(self, _: Any) -> None:
        state = self.pop()
        onto = self.top()
        if isinstance(onto, Object):
            onto.state = state

    def _table(self, args: tuple[Any, ...]) -> Table:
        """``OrderedDict([[k, v], …])``, the form of Python 2; a defaultdict's factory is passed over."""
        table = Table()
        for argument in args:
            if isinstance(argument, Table):
                self._copy(len(argument.entries))
                table.entries.update(argument.entries)
            elif isinstance(argument, (list, tuple)):
                self._copy(len(argument))
                for pair in argument:
                    if isinstance(pair, (list, tuple)) and len(pair) == 2:
                        table[pair[0]] = pair[1]
        return table

    def _copy(self, count: int) -> None:
        """One list copied a million times is work that no count of opcodes shows."""
        self.copied += count
        if self.copied > MAX_OPS:
            raise LimitError(f"more than {MAX_OPS:,} items copied")

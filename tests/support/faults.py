"""Faults injected into the functions that a thread calls, without their owners' knowledge.

A function's code is replaced in place, so it does not matter under which names it was imported, or what it is: a
function, a method, a property or a lambda.
"""

import contextlib
import gc
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

PACKAGE = str(Path(__file__).parent.parent.parent / "nemoe_jax")
_CALLS: dict[str, Callable] = {}


class Fault(RuntimeError):
    """What an injected fault raises."""


@contextlib.contextmanager
def recorded(thread_name: str) -> Iterator[dict[types.CodeType, int]]:
    """Counts calls of the package's functions in threads of that name that start within the context."""
    calls: dict[types.CodeType, int] = {}

    def note(frame, event, argument):
        ours = event == "call" and frame.f_code.co_filename.startswith(PACKAGE)
        if ours and threading.current_thread().name == thread_name:
            calls[frame.f_code] = calls.get(frame.f_code, 0) + 1

    threading.setprofile(note)
    try:
        yield calls
    finally:
        threading.setprofile(None)


def functions_of(codes: Iterable[types.CodeType]) -> dict[types.CodeType, types.FunctionType]:
    """The function with each code, where there is one alone (generator expressions and closures have several)."""
    found: dict[int, list[types.FunctionType]] = {id(code): [] for code in codes if not code.co_freevars}
    gc.unfreeze()  # frozen objects are not among those that are looked through
    for one in gc.get_objects():
        if type(one) is types.FunctionType and id(one.__code__) in found:
            found[id(one.__code__)].append(one)
    gc.freeze()
    return {own[0].__code__: own[0] for own in found.values() if len(own) == 1}


def name_of(function: types.FunctionType) -> str:
    """The module's last name and the function's."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"


@contextlib.contextmanager
def injected(function: types.FunctionType, thread_name: str, at: int = 1, times: int = 1, after: bool = False):
    """Makes calls of a function fail in threads of that name.

    Args:
        at: the first call that fails, from 1.
        times: how many calls fail from there on.
        after: the function does its work before it fails.
    """
    original = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    count = 0

    def call(*args, **kwargs):
        nonlocal count
        if threading.current_thread().name != thread_name:
            return original(*args, **kwargs)
        count += 1
        failing = at <= count < at + times
        if failing and not after:
            raise Fault(function.__name__)
        result = original(*args, **kwargs)
        if failing:
            raise Fault(function.__name__)
        return result

    def stub(*args, **kwargs):
        from tests.support import faults

        return faults._CALLS["key"](*args, **kwargs)

    key = str(id(call))
    _CALLS[key] = call
    code = function.__code__
    constants = tuple(key if one == "key" else one for one in stub.__code__.co_consts)
    function.__code__ = stub.__code__.replace(co_consts=constants, co_name=code.co_name)
    try:
        yield lambda: count
    finally:
        function.__code__ = code
        del _CALLS[key]


assert sys.implementation.name == "cpython"

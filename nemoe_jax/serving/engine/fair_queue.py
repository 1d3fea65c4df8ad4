"""The queue of requests that wait for a slot, fair between clients and adapters.

Of the requests with the lowest priority number, the groups (a client with an adapter) have their turns one after
another; within a group it is first come, first served.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator

from nemoe_jax.serving.engine.stream import ResponseStream


class FairQueue:
    """Waiting responses."""

    def __init__(self) -> None:
        self._groups: dict[int, OrderedDict[Hashable, deque[ResponseStream]]] = {}

    def __len__(self) -> int:
        return sum(len(waiting) for groups in self._groups.values() for waiting in groups.values())

    def __iter__(self) -> Iterator[ResponseStream]:
        """All, in no order that matters."""
        return iter([one for groups in self._groups.values() for waiting in groups.values() for one in waiting])

    def append(self, response: ResponseStream) -> None:
        """One more."""
        groups = self._groups.setdefault(response.request.priority, OrderedDict())
        groups.setdefault(_group(response), deque()).append(response)

    def first(self) -> ResponseStream:
        """Whose turn it is, of at least one."""
        return next(iter(self._groups[min(self._groups)].values()))[0]

    def pop(self) -> ResponseStream:
        """Takes the one whose turn it is out of the queue."""
        response = self.first()
        groups, group = self._groups[response.request.priority], _group(response)
        self.remove(response)
        if group in groups:
            groups.move_to_end(group)
        return response

    def remove(self, response: ResponseStream) -> None:
        """Takes one out."""
        priority, group = response.request.priority, _group(response)
        groups = self._groups[priority]
        groups[group].remove(response)
        if not groups[group]:
            del groups[group]
        if not groups:
            del self._groups[priority]

    def clear(self) -> None:
        """Takes all out."""
        self._groups.clear()


def _group(response: ResponseStream) -> Hashable:
    return response.request.client, response.request.adapter

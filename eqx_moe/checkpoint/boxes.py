"""Boxes of arrays: a range of places along each axis, and what of a file in C order has to be read for one."""

import math
from collections.abc import Callable, Iterable, Iterator

Box = tuple[range, ...]

# Bytes between two runs that are worth another read. Linux reads 128 KiB ahead, so that fewer come from the disk in any
# case; and from memory, half of each row took longer by itself than all of it, for rows of up to 256 KiB (measured).
_LEAST_LEFT_OUT = 1 << 17


def whole(shape: Iterable[int]) -> Box:
    """The box that is all of an array."""
    return tuple(map(range, shape))


def lengths(box: Box) -> tuple[int, ...]:
    """The shape of what is in a box."""
    return tuple(map(len, box))


def size(box: Box) -> int:
    """How many elements a box has."""
    return math.prod(map(len, box))


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many elements lie between neighbours along each axis of an array in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def extent(box: Box, shape: tuple[int, ...]) -> int:
    """How many elements there are from the first of a box to its last, those of others between them included."""
    return 1 + sum((len(along) - 1) * stride for along, stride in zip(box, strides(shape), strict=True))


def around(*boxes: Box) -> Box:
    """The smallest box, without steps, that has all of these in it; none of them is empty."""
    return tuple(
        range(min(r.start for r in along), max(r[-1] for r in along) + 1) for along in zip(*boxes, strict=True)
    )


def inside(box: Box, outer: Box) -> tuple[slice, ...]:
    """A box in an array that has what is in another, around it."""
    pairs = zip(box, outer, strict=True)
    return tuple(slice(along.start - by.start, along.stop - by.start, along.step) for along, by in pairs)


def common(one: Box, other: Box) -> int:
    """How many elements two boxes without steps share."""
    pairs = zip(one, other, strict=True)
    return math.prod(max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a, b in pairs)


def make_one(one: Box, other: Box) -> bool:
    """Whether two boxes without steps make up one, with nothing else in it."""
    return size(around(one, other)) == size(one) + size(other) - common(one, other)


def stroke(box: Box, shape: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """How a box is read: over its last axes at one stroke, from its first value to its last, if gaps are short.

    Returns:
        How many axes there are before those, and the elements of a stroke.
    """
    outer, span = len(box), 1
    for along, step in zip(reversed(box), reversed(strides(shape)), strict=True):
        if len(along) > 1 and (step - span) * itemsize >= _LEAST_LEFT_OUT:
            break
        outer, span = outer - 1, span + (len(along) - 1) * step
    return outer, span


def brought(box: Box, shape: tuple[int, ...], itemsize: int) -> int:
    """How many elements reading a box brings, with those in the gaps."""
    outer, span = stroke(box, shape, itemsize)
    return size(box[:outer]) * span


def united(boxes: Iterable[Box], when: Callable[[Box, Box], bool]) -> list[Box]:
    """The boxes, equal ones once, and two of them replaced by the one around both for as long as `when` says so."""
    result: list[Box] = []
    # In order, so that parts of a grid become rows, then planes; else pairs in different directions block one another.
    for box in sorted(dict.fromkeys(boxes), key=lambda box: [along.start for along in box]):
        while other := next((other for other in result if when(box, other)), None):
            result.remove(other)
            box = around(box, other)
        result.append(box)
    return result


def pieces(box: Box, shape: tuple[int, ...], most: int) -> Iterator[Box]:
    """The box cut up into boxes with an extent of at most so many elements, in the order of the array."""
    if not size(box):
        return
    if extent(box, shape) <= most:
        yield box
        return
    axis = next(axis for axis, along in enumerate(box) if len(along) > 1)
    before, along, after = box[:axis], box[axis], box[axis + 1 :]
    rest = extent((*(range(1) for _ in before), range(1), *after), shape)
    step = max(1, (most - rest) // strides(shape)[axis] + 1)
    for first in range(0, len(along), step):
        yield from pieces((*before, along[first : first + step], *after), shape, most)


def meeting(along: range, within: range) -> slice:
    """Which elements of a range, by their number in it, lie in another that has no step."""
    first, stop = (-((along.start - end) // along.step) for end in (within.start, within.stop))
    return slice(max(0, first), max(0, min(stop, len(along))))

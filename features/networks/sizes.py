"""Image sizes for which a network of Keras is the same graph, so that one conversion serves them all.

Networks halve an image five times, and pad it by its being odd or even each time. So sizes that differ by multiples of 32
pixels give the same graph, and the shapes of its layers grow evenly with them.
"""

from __future__ import annotations

from collections.abc import Sequence

STEP = 32  # pixels
_SMALLEST = 96  # every builder of ``keras.applications`` takes it
Size = tuple[int, int]  # height and width in pixels


def kin(size: Size) -> list[int]:
    """Return what sizes of one graph have in common."""
    return [length % STEP for length in size]


def another(size: Size) -> Size:
    """Return another size of the same graph, a small one that is soon computed.

    Examples
    --------
    >>> another((224, 160)), another((150, 200))
    ((96, 96), (214, 104))
    """
    least = _SMALLEST + 2 * STEP  # of one step, layers that halve an image six times would seem to stay the same
    height, width = (length + 2 * STEP if length < least else _SMALLEST + length % STEP for length in size)
    return height, width


def reaches(size: Size, known: Sequence[Size]) -> bool:
    """Whether what is known at two sizes of one graph tells about a third: not of a smaller one, which may be refused."""
    return len(known) > 1 and all(
        length % STEP == first % STEP and length >= min(first, second)
        for length, first, second in zip(size, *known, strict=True)
    )


def shape_at(size: Size, known: Sequence[tuple[Size, tuple[int, ...]]]) -> tuple[int, ...] | None:
    """Return the shape of a layer at a size, if it is known at two sizes of the same graph.

    Parameters
    ----------
    size : (int, int)
        Height and width of the images in pixels.
    known : sequence of ((int, int), tuple of int), length 2
        Sizes, which differ in both lengths, and the shape of the layer at each, without the batch axis.

    Returns
    -------
    tuple of int or None
        None if the size is smaller than both or of another graph, or if the shape is not one of (h, w, c) that grows evenly.

    Examples
    --------
    >>> shape_at((160, 192), [((224, 224), (7, 7, 8)), ((96, 96), (3, 3, 8))])
    (5, 6, 8)
    >>> shape_at((160, 192), [((224, 224), (8,)), ((96, 96), (8,))])
    (8,)
    >>> shape_at((160, 192), [((224, 224), (49, 8)), ((96, 96), (9, 8))])
    """
    (first, shape), (second, other) = known
    if not reaches(size, [first, second]):
        return None
    if shape == other:
        return shape
    if len(shape) != 3 or len(other) != 3 or shape[2] != other[2]:
        return None
    lengths = []
    for asked, one, two, length, less in zip(size, first, second, shape, other, strict=False):
        slope, rest = divmod((length - less) * STEP, one - two)
        if rest:
            return None
        lengths.append(length + slope * (asked - one) // STEP)
    return (*lengths, shape[2])

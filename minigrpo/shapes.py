"""Shape comments that run: dimension letters are bound to sizes, or a ValueError says what misfits.

Of a record they are in its annotations, tokens: Annotated[Tensor, "N C"], and `check_record` reads
them there.
"""

from functools import cache
from typing import Annotated, get_origin, get_type_hints

import torch


def check_shapes(**tensors: tuple[torch.Tensor | None, str]) -> dict[str, int]:
    """Bind the dimensions of named tensors and return the bindings; ValueError if one misfits.

    A dimension is a letter, a size or a letter plus a size; a letter keeps the first size it meets;
    None, for what is optional, fits any shape:
    check_shapes(states=(states, "N T+1 2"), controls=(controls, "N T")) -> {"N": 8, "T": 50}
    """
    sizes: dict[str, int] = {}
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        dimensions = shape.split()
        letters = dict.fromkeys(dimension.partition("+")[0] for dimension in dimensions)
        known = [f"{letter}={sizes[letter]}" for letter in letters if letter in sizes]
        fits = tensor.ndim == len(dimensions)
        for dimension, size in zip(dimensions, tensor.shape, strict=False):
            letter, _, extra = dimension.partition("+")
            value = size - int(extra or 0)
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, value)
            fits &= value == expected and value >= 0
        if not fits:
            wanted = f"[{', '.join(dimensions)}]" + (f" with {', '.join(known)}" if known else "")
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
    return sizes


def check_record(record: object, **more: tuple[torch.Tensor | None, str]) -> None:
    """`check_shapes` of a dataclass's annotated fields and, after these, of more tensors."""
    shapes = _annotated_shapes(type(record))  # type: ignore[arg-type]  # classes are hashable
    try:
        check_shapes(**{name: (getattr(record, name), shapes[name]) for name in shapes}, **more)
    except ValueError as error:
        raise ValueError(f"{type(record).__name__}: {error}") from None


@cache
def _annotated_shapes(kind: type[object]) -> dict[str, str]:
    hints = get_type_hints(kind, include_extras=True).items()
    return {name: hint.__metadata__[0] for name, hint in hints if get_origin(hint) is Annotated}

"""Fused layers: the low-rank updates of several layers as one update of their weights stacked by rows, and back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._adapter import LowRank
from qrlora.formats.keys import Target


def fuse(target: Target, pairs: Mapping[str, LowRank]) -> LowRank:
    """One pair for `target`, from the pairs of those of its parts that are adapted; exact.

    One `A` for all parts gives the rank of one. Otherwise the pairs stand block by block on the diagonal: parts of one
    rank r give `len(target.parts) * r`, where a part that is not adapted is a block of zeros (diffusers' own converter
    then takes the blocks apart again); parts of different ranks give the sum.

    Args:
        target: the original layer.
        pairs: diffusers path to pair, for one part or more.

    Raises:
        QrloraError: the parts do not fit together, naming them.
    """
    if len(target.parts) == 1:
        return _turned(target, pairs[target.parts[0].path])
    unit = _unit(target, pairs)
    inputs = {pair.A.shape[1:] for pair in pairs.values()}
    if len(inputs) > 1 or any(pair.A.ndim != 2 for pair in pairs.values()):
        raise QrloraError(f"{', '.join(pairs)} have inputs of different sizes, so they are no single {target.name}.")
    first = next(iter(pairs.values()))
    rows = [part.share * unit for part in target.parts]
    if all(torch.equal(pair.A, first.A) for pair in pairs.values()):
        blocks = [
            pairs[part.path].B if part.path in pairs else first.B.new_zeros(size, first.rank)
            for part, size in zip(target.parts, rows, strict=True)
        ]
        return LowRank(torch.cat(blocks), first.A)
    missing = first.rank if len({pair.rank for pair in pairs.values()}) == 1 else 0
    factors = [
        pairs.get(part.path) or LowRank(first.B.new_zeros(size, missing), first.A.new_zeros(missing, first.A.shape[1]))
        for part, size in zip(target.parts, rows, strict=True)
    ]
    return LowRank(_block_diagonal([each.B for each in factors]), torch.cat([each.A for each in factors]))


def split(target: Target, pair: LowRank) -> dict[str, LowRank]:
    """The pairs of a target's parts, exact, each at the smallest rank that its block structure shows.

    Parts without an update are left out, unless none has one.

    Raises:
        QrloraError: the rows cannot be shared out among the parts.
    """
    if len(target.parts) == 1:
        return {target.parts[0].path: _turned(target, pair)}
    total = sum(part.share for part in target.parts)
    if pair.B.ndim != 2 or pair.B.shape[0] % total:
        raise QrloraError(
            f"{target.name} has {pair.B.shape[0]} outputs, which cannot be shared out among "
            f"{', '.join(part.path for part in target.parts)}."
        )
    unit = pair.B.shape[0] // total
    rows = [part.share * unit for part in target.parts]
    blocks = dict(zip((part.path for part in target.parts), torch.split(pair.B, rows), strict=True))
    found = _diagonal(blocks, pair.A)
    if found is None:
        found = {path: _without_zero_columns(B, pair.A) for path, B in blocks.items() if bool(B.any())}
    return found or {path: LowRank(B.clone(), pair.A) for path, B in blocks.items()}


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    rows, columns = (sum(block.shape[side] for block in blocks) for side in (0, 1))
    whole = blocks[0].new_zeros(rows, columns)
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def _diagonal(blocks: Mapping[str, Tensor], A: Tensor) -> dict[str, LowRank] | None:
    """The blocks on the diagonal where there is nothing beside it, less the blocks that are nothing but padding."""
    if A.shape[0] % len(blocks):
        return None
    rank = A.shape[0] // len(blocks)
    found: dict[str, LowRank] = {}
    for index, (path, B) in enumerate(blocks.items()):
        columns = slice(index * rank, (index + 1) * rank)
        if bool(B[:, : columns.start].any()) or bool(B[:, columns.stop :].any()):
            return None
        if bool(B[:, columns].any()) or bool(A[columns].any()):
            found[path] = LowRank(B[:, columns].clone(), A[columns].clone())
    return found


def _without_zero_columns(B: Tensor, A: Tensor) -> LowRank:
    used = B.any(dim=0)
    return LowRank(B[:, used].clone(), A[used].clone())


def _unit(target: Target, pairs: Mapping[str, LowRank]) -> int:
    """Rows of a part of share 1, which the adapted parts must agree on."""
    sizes = {part.path: (pairs[part.path].B.shape[0], part.share) for part in target.parts if part.path in pairs}
    units = {size / share for size, share in sizes.values()}
    unit = units.pop()
    if units or not unit.is_integer():
        described = ", ".join(f"{path} has {size} outputs" for path, (size, _) in sizes.items())
        raise QrloraError(f"{described}, which is not how {target.name} is made up; is the model of another family?")
    return int(unit)


def _turned(target: Target, pair: LowRank) -> LowRank:
    """The halves of the outputs exchanged, which is its own inverse."""
    two = pair.B.shape[0] == 2 * pair.A.shape[1] and pair.B.ndim == 2
    if target.swap == "never" or (target.swap == "if_two" and not two):
        return pair
    if pair.B.shape[0] % 2:
        raise QrloraError(f"{target.name} has {pair.B.shape[0]} outputs, an odd number, but consists of halves.")
    first, second = pair.B.chunk(2)
    return LowRank(torch.cat([second, first]), pair.A)

"""Gather row-sharded matrices, each completely on one rank, and scatter them back."""

from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor


def rows_of_ranks(rows: int, ranks: int) -> list[int]:
    """Number of rows that each rank holds: FSDP's equal parts, the last ones smaller or empty."""
    part = -(-rows // ranks)
    return [min(part, max(0, rows - rank * part)) for rank in range(ranks)]


class Exchange:
    """Rank i % ranks owns matrix i; `owned` are the indices of this rank's matrices. One collective each way.

    shapes: of the full matrices. group: the ranks that they are sharded over; None or one rank: not sharded.
    """

    def __init__(self, shapes: list[torch.Size], group: dist.ProcessGroup | None):
        self.shapes, self.group = shapes, group
        self.ranks, rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
        places = [range(owner, len(shapes), self.ranks) for owner in range(self.ranks)]
        self.order, self.owned = list(chain.from_iterable(places)), places[rank]
        parts = [[rows * shape[1] for rows in rows_of_ranks(shape[0], self.ranks)] for shape in shapes]
        self.held = [[parts[i][rank] for i in owned] for owned in places]  # by owner: elements that this rank holds
        self.parts = [[parts[i][r] for i in self.owned] for r in range(self.ranks)]  # by rank: of matrices owned here

    def to_owners(self, rows: list[Tensor]) -> list[Tensor]:
        """The full matrices that this rank owns, from each rank's rows. Must be called on all ranks."""
        if self.ranks == 1:
            return list(rows)
        pieces = self._exchange(rows[0], [rows[i] for i in self.order], self.held, self.parts)
        return [torch.cat(pieces[k :: len(self.owned)]).view(self.shapes[i]) for k, i in enumerate(self.owned)]

    def to_rows(self, whole: list[Tensor], like: Tensor) -> list[Tensor]:
        """This rank's rows of every matrix, from the owners' full matrices. Must be called on all ranks.

        like: a tensor with the dtype and device, for a rank that owns none.
        """
        if self.ranks == 1:
            return whole
        split = [x.flatten().split([of[k] for of in self.parts]) for k, x in enumerate(whole)]
        pieces = self._exchange(like, [x[r] for r in range(self.ranks) for x in split], self.parts, self.held)
        by_place = dict(zip(self.order, pieces, strict=True))
        return [by_place[i].view(-1, shape[1]) for i, shape in enumerate(self.shapes)]

    def _exchange(self, like: Tensor, pieces: list[Tensor], sent: list, received: list) -> tuple[Tensor, ...]:
        """Send pieces and return the received ones. sent, received: for each rank, the sizes of its pieces."""
        outbox = torch.cat([like.new_empty(0), *(piece.flatten() for piece in pieces)])
        to, from_ = [sum(sizes) for sizes in sent], [sum(sizes) for sizes in received]
        inbox = like.new_empty(sum(from_))
        dist.all_to_all_single(inbox, outbox, output_split_sizes=from_, input_split_sizes=to, group=self.group)
        return inbox.split(list(chain.from_iterable(received)))

"""What did compression cut off? The error feedback of one peer: kept, checkpointed, and sent later.

Two kinds (Seide et al. 2014; Karimireddy et al. 2019; both ends as in Tang et al. 2019, DoubleSqueeze):
what encoding the own delta lost, one value per coordinate; and what encoding the results of the parts
that this peer reduces lost. Both change only with a commit that contains them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from coordinator.chain import Chain
from peer.compression import residual_into
from peer.manifest import Outgoing


class ErrorFeedback:
    """Residuals of one peer as a sender and as a reducer. Not thread-safe."""

    def __init__(
        self, sent: torch.Tensor | None = None, reduced: Mapping[int, torch.Tensor] | None = None
    ) -> None:
        self.sent = sent  # (num_values,) float32; None: all zero
        self.reduced: dict[int, torch.Tensor] = dict(reduced or {})  # by part

    def add_to(self, delta: torch.Tensor) -> torch.Tensor:
        """What to send: the delta with what was cut off before, in place; the residual has moved there.

        So a delta that never gets into a commit carries it along, and nothing counts twice.
        """
        if self.sent is not None:
            np.add(delta.numpy(), self.sent.numpy(), out=delta.numpy())  # in one thread
            self.sent = None
        return delta

    def committed(
        self,
        sum_sent: torch.Tensor,
        outgoing: Outgoing,
        missing: Sequence[Sequence[int]],
        reduced: Mapping[int, torch.Tensor],
    ) -> None:
        """A commit holds `outgoing`, but for the parts in `missing`; `sum_sent` is what was encoded.

        `sum_sent` is used up: what its encoding lost becomes the residual; all of it where a part is in no
        result.
        """
        self.reduced.update(reduced)
        if not outgoing.codec.is_lossy:
            return
        unsent = {part for first, stop in missing for part in range(first, stop)}
        for part in range(outgoing.grid.num_parts):
            if part not in unsent:
                start, stop = outgoing.grid.bounds(part)
                residual_into(sum_sent[start:stop], outgoing.parts[part], outgoing.codec)
        self.sent = sum_sent

    def forget_reduced(self) -> None:
        """The chain has gone on without this peer's own result: what others saw it sign is not what it holds.

        Auditors compare the two (`peer.contradiction`), and to begin without feedback is always allowed.
        """
        self.reduced.clear()

    def reduced_by_name(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {f"part.{part:05d}": values for part, values in sorted(self.reduced.items())}

    @classmethod
    def of(cls, sent: torch.Tensor | None, reduced: Mapping[str, torch.Tensor]) -> ErrorFeedback:
        """From a checkpoint: the residual of the own deltas, and what `reduced_by_name` gave."""
        return cls(sent, {int(name.removeprefix("part.")): values for name, values in reduced.items()})


def cut_to_usual_norm(vector: torch.Tensor, chain: Chain) -> torch.Tensor | None:
    """What a peer keeps for the next round must not stand out: at most the median norm of the last fusion's
    contributions. `vector` itself where nothing is known or it is short enough; None where it is not finite.
    """
    norm = float(torch.linalg.vector_norm(vector))
    if not math.isfinite(norm):
        return None
    commits = [signed.commit for signed in chain.commits if signed.commit.contributors]
    others = [c.norm for c in commits[-1].contributors if c.norm > 0] if commits else []
    cap = statistics.median(others) if others else norm
    return vector * (cap / norm) if norm > cap else vector

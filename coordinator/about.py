"""What may a peer say of itself in its heartbeat, for people who watch? Bounded, and decides nothing.

Its author signs it with the heartbeat; nobody checks whether it is true, and its texts are untrusted.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_NAME_CHARS = 40  # of what a peer calls itself and its device
MAX_METRIC_CHARS = 24

Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
Count = Annotated[int, Field(ge=0, le=2**53)]  # bounded, so that it converts to a float
Score = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]  # accuracy, or a correlation


class _Said(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Scores(_Said):
    """What a peer has measured on its own held-out split; sent only where its person agreed."""

    round: Count  # that ended with the fused backbone
    metric: Annotated[str, Field(max_length=MAX_METRIC_CHARS)]  # of the task
    base: Score | None = None  # of the backbone that the round began with
    own: Score | None = None  # of this peer's own, finetuned in that round
    fused: Score | None = None


class AboutPeer(_Said):
    """The name is there only where a person gave one, the scores only where it agreed to share them."""

    name: Name = ""
    device: Name = ""
    examples_per_second: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | None = None
    progress: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None  # of the phase
    bytes_sent: Count = 0  # since its process started, all that its ledger holds
    bytes_received: Count = 0  # since its process started: averages and states
    scores: Scores | None = None

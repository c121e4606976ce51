"""What one peer was told on its command line, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coordinator.credentials import Invite
from coordinator.organizer import default_key_path
from peer.data import DataConfig
from peer.finetune import FinetuneConfig

Reachability = Literal["unknown", "public", "private"]


@dataclass(frozen=True)
class PeerConfig:
    output_dir: Path  # checkpoints, model/, task_model/, rounds.jsonl, identity
    data: DataConfig  # the private examples
    finetune: FinetuneConfig = FinetuneConfig()  # how to train on them
    initial_peers: tuple[str, ...] = ()  # entry points; empty: begin a swarm, or resume
    run_digest: str | None = None  # the run to trust; None: ask the entry point
    invite: Invite | None = None  # of a private run
    organizer_key: Path = field(default_factory=default_key_path)  # of a private run that begins here
    identity_path: Path | None = None  # None: identity.key in output_dir
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)  # where to listen
    listens: bool = True  # False: takes no connections, only makes them
    reachability: Reachability = "unknown"  # whether others can dial this peer; private: ask for a relay
    announce_maddrs: tuple[str, ...] = ()  # what to tell others, where it differs
    num_rounds: int | None = None  # leave after so many committed rounds; None: the run's end
    max_seconds: float | None = None  # leave after this time
    linger_seconds: float = 60.0  # after the last round: serve the state, at most so long
    name: str = ""  # how people who watch see this peer; at most 40 characters
    shares_metrics: bool = False  # whether its scores go into its heartbeats
    eval_examples: int = 1000  # held-out examples scored per backbone
    num_threads: int | None = None  # of the processor; None: all
    max_upload_bytes_per_second: float | None = None  # None: as fast as the line takes it
    seed: int = 0  # of this peer's own draws: batches, heads, splits

    @property
    def identity_file(self) -> Path:
        return self.identity_path or self.output_dir / "identity.key"

"""Which first commit is the run's? Whoever began the run says so, once, under its signature.

Of two chains that part later, those who made what both share decide (`chain.is_better`). Before the first
commit nobody has made anything, so made-up keys could begin as well as those who are there. But the spec,
which everybody trusts, names the key of who began the run, its starter: it is there when the first round is
made, and signs the first commit that it sees those make whom it saw train. Its word travels in the heartbeats
of all and in the chain, so after that it may go. A chain with another beginning loses to one with this.

Where the starter left before the first round, there is no such word, and `chain.is_better` decides alone.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from coordinator.admission import write_private
from coordinator.chain import Chain, is_witness
from coordinator.errors import StateError
from coordinator.identity import Identity
from coordinator.records import FirstCommit, RecordError, Witness, parse_json, parse_record, signature_text
from coordinator.spec import RunSpec

logger = logging.getLogger(__name__)

WITNESS_NAME = "witness.json"  # in the output directory of the starter


class Beginning:
    """Of one run. For one thread: that of the network, once it runs."""

    def __init__(self, spec: RunSpec, identity: Identity | None = None, file: Path | None = None) -> None:
        """With the starter's `identity`, it signs, and keeps what it signed in `file`.

        Raises StateError when that file is there and is not of this run.
        """
        self._spec, self._file = spec, file
        self._identity = identity if identity is not None and identity.peer_id == spec.starter else None
        self._trainers: set[str] = set()  # whom the starter saw train for the first round
        self.witness = None if self._identity is None else self._kept()  # the first one heard is kept

    @property
    def watches(self) -> bool:
        """Whether it is for me to sign, and not done yet."""
        return self._identity is not None and self.witness is None

    def learn(self, witness: Witness | None) -> None:
        """What a heartbeat or a chain says; ignored where it does not hold."""
        if witness is not None and self.witness is None and is_witness(witness, self._spec):
            self.witness = witness

    def saw_training(self, peers: Collection[str]) -> None:
        self._trainers |= set(peers)

    def is_other(self, chain: Chain) -> bool:
        """Whether a chain does not begin as the run did; to the starter, before it has signed: whether the
        peers that it saw train, at least half of as many as a round takes, did not make its first commit.
        """
        if not chain.commits:
            return False
        first = chain.commits[0].commit
        if self.witness is not None:
            return self.witness.commit != first.hash
        if not self.watches or not self._trainers or self._has_signed(chain):
            return False
        num_seen = min(len(self._trainers), self._spec.max_peers)
        return 2 * len(self._trainers & first.cohort) < num_seen

    def of(self, chain: Chain) -> Chain:
        """The chain with the starter's word, where that is known here, and is of its first commit."""
        self.learn(chain.witness)
        return chain if self.witness is None else chain.witnessed(self.witness)

    def sign(self, chain: Chain) -> None:
        """The starter has adopted this chain. It signs once, and keeps that before it is said."""
        identity = self._identity
        if identity is None or not self.watches or not chain.commits or self.is_other(chain):
            return
        if not (self._trainers or self._has_signed(chain)):
            return  # a starter that was away then cannot tell
        value = FirstCommit(run=self._spec.digest, commit=chain.commits[0].commit.hash)
        witness = Witness(commit=value.commit, signature=signature_text(value, identity))
        try:
            if self._file is not None:
                write_private(self._file, witness.canonical())
        except OSError as error:
            logger.warning("the run's first commit is not signed yet: %s: %s", self._file, error.strerror)
            return
        self.witness = witness
        logger.info("signed the run's first commit: from now on it needs nobody in particular")

    def _has_signed(self, chain: Chain) -> bool:
        """As a voter: the starter may train, too."""
        return self._identity is not None and self._identity.peer_id in chain.commits[0].signatures

    def _kept(self) -> Witness | None:
        if self._file is None or not self._file.exists():
            return None
        try:
            witness = parse_record(parse_json(self._file.read_bytes()), Witness)
        except (OSError, RecordError) as error:
            raise StateError(f"{self._file} cannot be read ({error}); restore or delete it") from error
        if not is_witness(witness, self._spec):
            raise StateError(f"{self._file} is of another run or of another peer; restore or delete it")
        return witness

"""Which first commit is the run's? Whoever began the run says so, once, under its signature.

Of two chains that part later, those who made what both share decide (`chain.is_better`). Before the first
commit nobody has made anything, so made-up keys could begin as well as those who are there. But the spec,
which everybody trusts, names the key of who began the run, its starter. It is there when the first round is
made, and signs its commit, if that is signed by peers that it saw train, by more of them than still
train for another one. Its word travels in the heartbeats of all and in the chain, so after that it may go; a
chain with it wins over a chain that begins otherwise. It binds nobody to more than that: a word for a commit
that there is not changes nothing, and chains with two different words are compared as others are.

Only the process that began the run signs: one that was away cannot tell which of two beginnings came first.
Where there is no word, `chain.is_better` decides alone.
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
MAX_SEEN = 4096  # peers; membership knows no more of them at a time


class Beginning:
    """Of one run. For one thread: that of the network, once it runs."""

    def __init__(
        self,
        spec: RunSpec,
        identity: Identity | None = None,
        file: Path | None = None,
        *,
        is_new: bool = False,
    ) -> None:
        """The starter, who has the `identity` that the spec names, keeps in `file` what it signed.

        `is_new`: the run begins with this process.
        Raises StateError when that file is there and is not of this run.
        """
        self._spec, self._file = spec, file
        self._identity = identity if identity is not None and identity.peer_id == spec.starter else None
        self._seen: set[str] = set()  # whom the starter saw train for the first round
        self._is_new = is_new
        self.witness = None if self._identity is None else self._kept()  # the first one heard is kept

    @property
    def watches(self) -> bool:
        """Whether it is for me to sign, and not done yet."""
        return self._identity is not None and self._is_new and self.witness is None

    def learn(self, witness: Witness | None) -> None:
        """What a heartbeat or a chain says; ignored where it does not hold."""
        if witness is not None and self.witness is None and is_witness(witness, self._spec):
            self.witness = witness

    def of(self, chain: Chain) -> Chain:
        """The chain with the starter's word, where that is known here, and is of its first commit."""
        if self.witness is None:
            self.learn(chain.witness)
        return chain if self.witness is None else chain.witnessed(self.witness)

    def consider(self, chain: Chain, training: Collection[str]) -> None:
        """The starter looks at a verified chain. `training`: who trains for the first round, as it hears now.

        Who is named in a commit has signed nothing; its voters have. What it signs is kept before it is said.
        """
        identity = self._identity
        if identity is None or not self.watches:
            return
        if len(self._seen) < MAX_SEEN:
            self._seen |= set(training)
        if chain.commits and self._is_made_by_those_here(chain, training, identity.peer_id):
            self._sign(chain.commits[0].commit.hash, identity)

    def _is_made_by_those_here(self, chain: Chain, training: Collection[str], me: str) -> bool:
        signers = chain.commits[0].voters
        seen = signers & (self._seen | {me})
        elsewhere = set(training) - signers
        return 2 * len(seen) > len(signers) and len(seen) > len(elsewhere)

    def _sign(self, commit: str, identity: Identity) -> None:
        value = FirstCommit(run=self._spec.digest, commit=commit)
        witness = Witness(commit=commit, signature=signature_text(value, identity))
        try:
            if self._file is not None:
                write_private(self._file, witness.canonical())
        except OSError as error:
            logger.warning("the run's first commit is not signed yet: %s: %s", self._file, error.strerror)
            return
        self.witness = witness
        logger.info("signed the run's first commit: from now on it needs nobody in particular")

    def _kept(self) -> Witness | None:
        if self._file is None or not self._file.exists():
            return None
        try:
            witness = parse_record(parse_json(self._file.read_bytes()), Witness)
        except (OSError, RecordError) as error:
            raise StateError(f"{self._file} cannot be read ({error}); restore it from a backup") from error
        if not is_witness(witness, self._spec):
            raise StateError(f"{self._file} is of another run or of another peer; move it away")
        return witness

"""Whose word says how a run began, when is it given, and what does it win?"""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.agreement import Agreement
from coordinator.beginning import WITNESS_NAME, Beginning
from coordinator.chain import Chain, build_chain, is_better
from coordinator.errors import StateError
from coordinator.identity import load_identity
from coordinator.network import Network
from coordinator.records import (
    GENESIS,
    FirstCommit,
    RecordError,
    SignedCommit,
    Witness,
    sign,
    signature_text,
)
from tests.fakes import (
    CALL_SECONDS,
    extend,
    hash_of,
    identity,
    make_heartbeat,
    make_spec,
    peer,
    peers,
    running_networks,
)

SPEC = make_spec(starter=peer("starter"))
EMPTY = Chain(SPEC)
ABC = ["a", "b", "c"]
HONEST = extend(EMPTY, ABC)
LIARS = list("tuvwxyz")


def forged(chain: Chain = EMPTY) -> Chain:
    """More peers, and all rounds of the run."""
    first = chain
    while chain.round < chain.spec.num_rounds:
        chain = extend(chain, LIARS, state_hash=hash_of(f"forged {chain.round}"))
    assert is_better(chain, extend(first, ABC))
    return chain


def word(chain: Chain, signer: str = "starter", **changes: str) -> Witness:
    commit = chain.commits[0].commit.hash
    value = FirstCommit(run=chain.spec.digest, commit=commit)
    return Witness(**{"commit": commit, "signature": signature_text(value, identity(signer)), **changes})


def starter(directory: Path, seen: str = "", **changes: bool) -> Beginning:
    """Who saw these train for the first round."""
    beginning = Beginning(SPEC, identity("starter"), directory / WITNESS_NAME, **{"is_new": True, **changes})
    beginning.consider(EMPTY, peers(seen))
    return beginning


def test_a_chain_with_the_starters_word_wins_over_any_that_begins_otherwise() -> None:
    witnessed = HONEST.witnessed(word(HONEST))
    assert witnessed.tip == HONEST.tip
    assert build_chain(SPEC, witnessed.commits) == witnessed
    assert is_better(witnessed, forged())
    assert not is_better(forged(), witnessed)
    longer = extend(witnessed, ABC)
    assert is_better(longer, witnessed)  # of chains that begin alike the rest decides
    assert longer.witness == word(HONEST)
    assert HONEST.witnessed(word(forged())) is HONEST


@pytest.mark.parametrize("signer", ["a", "t"])
def test_nobody_elses_word_counts(signer: str) -> None:
    beginning = Beginning(SPEC)
    for wrong in (word(HONEST, signer), word(HONEST, commit=hash_of("x")), word(HONEST, signature="")):
        beginning.learn(wrong)
        assert beginning.witness is None
    first = HONEST.commits[0].model_copy(update={"witness": word(HONEST, signer).signature})
    with pytest.raises(RecordError, match="starter is said to have signed does not fit"):
        build_chain(SPEC, [first])
    nobody = Beginning(make_spec())  # a run that names none
    nobody.learn(word(extend(Chain(make_spec()), ABC)))
    assert nobody.witness is None


def test_only_the_first_commit_has_it() -> None:
    two = extend(HONEST, ABC)
    value = FirstCommit(run=SPEC.digest, commit=two.tip)
    second = SignedCommit(
        commit=two.commits[1].commit,
        signatures=two.commits[1].signatures,
        witness=signature_text(value, identity("starter")),
    )
    with pytest.raises(RecordError, match="does not fit"):
        build_chain(SPEC, [two.commits[0], second])


def test_the_first_word_that_is_heard_is_kept_and_binds_nobody_to_what_there_is_not() -> None:
    beginning = Beginning(SPEC)
    beginning.learn(word(HONEST))
    beginning.learn(word(forged()))  # a starter that says two things
    assert beginning.witness == word(HONEST)
    assert beginning.of(HONEST).witness == word(HONEST)
    assert beginning.of(forged()) == forged()
    one, other = HONEST.witnessed(word(HONEST)), forged().witnessed(word(forged()))
    assert is_better(other, one)  # as if neither had a word
    assert not is_better(one, other)
    lost = Beginning(SPEC)
    lost.learn(word(extend(EMPTY, ["a", "b"], state_hash=hash_of("nowhere"))))
    assert lost.of(HONEST) == HONEST


def test_the_starter_signs_once_and_remembers_it(tmp_path: Path) -> None:
    beginning = starter(tmp_path, "abc")
    assert beginning.watches
    beginning.consider(extend(HONEST, ABC), ())
    assert beginning.witness == word(HONEST)
    beginning.consider(forged(), peers(LIARS))
    again = starter(tmp_path, "tuvwxyz")  # after a restart
    again.consider(forged(), ())
    assert again.witness == word(HONEST)
    assert not again.watches


@pytest.mark.parametrize(
    ("seen", "training", "is_signed"),
    [
        ("abc", "", True),
        ("abcdefg", "", True),  # who tried and left
        ("abcdefg", "defg", False),  # more still train for another one
        ("abcde", "de", True),
        ("abc", "abc", True),  # they have not said yet that it is made
        ("ab", "", True),
        ("a", "", False),  # less than half of its signers
        ("xyz", "", False),
        ("", "", False),
    ],
)
def test_the_starter_signs_what_those_signed_whom_it_saw_train(
    tmp_path: Path, seen: str, training: str, is_signed: bool
) -> None:
    beginning = starter(tmp_path, seen)
    beginning.consider(HONEST, peers(training))
    assert (beginning.witness is not None) == is_signed


def test_named_is_not_signed(tmp_path: Path) -> None:
    """Two made-up keys name the five that train, and vote alone."""
    five = list("abcde")
    named = extend(EMPTY, five, ["t", "u"], electorate=list(peers("tu")))
    beginning = starter(tmp_path, "abcdetu")
    beginning.consider(named, peers("abcde"))
    assert beginning.witness is None
    padded = extend(EMPTY, five, ["t", "u"], electorate=list(peers("tua")))
    beginning.consider(padded, peers("abcde"))
    assert beginning.witness is None
    beginning.consider(extend(EMPTY, five), ())
    assert beginning.witness is not None


def test_a_starter_that_was_away_cannot_tell(tmp_path: Path) -> None:
    away = starter(tmp_path, "t", is_new=False)
    away.consider(extend(EMPTY, ["t", "u"]), ())
    assert away.witness is None
    starter(tmp_path, "abc").consider(HONEST, ())
    assert starter(tmp_path, is_new=False).witness == word(HONEST)  # it has told already


def test_a_starter_that_trains_signs_what_it_voted_for(tmp_path: Path) -> None:
    beginning = starter(tmp_path)
    beginning.consider(extend(EMPTY, ["a", "b", "starter"], ["a", "b"]), ())
    assert beginning.witness is None
    own = extend(EMPTY, ["a", "starter"])
    beginning.consider(own, peers("a"))
    assert beginning.witness == word(own)


@pytest.mark.parametrize("text", ["", "{}", "no JSON"])
def test_a_word_that_cannot_be_read_is_not_given_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / WITNESS_NAME).write_text(text)
    with pytest.raises(StateError, match=r"witness\.json cannot be read"):
        starter(tmp_path)
    (tmp_path / WITNESS_NAME).write_bytes(word(HONEST, "a").canonical())
    with pytest.raises(StateError, match="of another run or of another peer; move it away"):
        starter(tmp_path)
    Beginning(SPEC, identity("a"), tmp_path / WITNESS_NAME)  # which is not the starter


def test_the_word_is_kept_before_it_is_said(tmp_path: Path) -> None:
    beginning = starter(tmp_path / "missing", "abc")
    beginning.consider(HONEST, ())
    assert beginning.witness is None
    (tmp_path / "missing").mkdir()
    beginning.consider(HONEST, ())
    assert beginning.witness == word(HONEST)


def test_a_swarm_leaves_a_forged_beginning_for_that_of_its_starter(tmp_path: Path) -> None:
    """Real networks: a newcomer meets liars first, who have more peers and more rounds than the honest.

    Starter, an honest peer, a liar and the newcomer have the numbers 0 to 3.
    """
    with running_networks(4, tmp_path) as networks:
        identities = [load_identity(tmp_path / f"{index}.key") for index in range(4)]
        first = identities[0]
        spec = make_spec(starter=first.peer_id, lease_seconds=60.0, created_at=Network.now())
        empty = Chain(spec)
        file = tmp_path / WITNESS_NAME
        agreements = [
            Agreement(
                networks[0],
                first,
                empty,
                serves_only=True,
                beginning=Beginning(spec, first, file, is_new=True),
            ),
            *(Agreement(networks[index], identities[index], empty) for index in (1, 2, 3)),
        ]
        one = extend(empty, ABC)
        for network, agreement in zip(networks, agreements, strict=True):
            network.run(agreement.start(), timeout_seconds=CALL_SECONDS)

        def tell(sender: int, receiver: int) -> None:
            own = sign(agreements[sender]._heartbeat(), identities[sender]).to_json()
            call = networks[sender].call(networks[receiver].peer_id, "heartbeat", own, timeout_seconds=5.0)
            networks[sender].run(call, timeout_seconds=CALL_SECONDS)

        def adopt(index: int, chain: Chain) -> None:
            async def adopt() -> None:
                agreements[index].adopt(chain)

            networks[index].run(adopt(), timeout_seconds=CALL_SECONDS)

        def look(index: int) -> Chain | None:
            found = networks[index].run(agreements[index].better_chain(), timeout_seconds=CALL_SECONDS)
            return None if found is None else found[0]

        now = Network.now()
        for name in ABC:  # whom the starter sees train
            training = make_heartbeat(empty, issued_at=now, expires_at=now + 60.0)
            signed = sign(training, identity(name))
            agreements[0].membership.observe(signed.to_bytes(), now=now, claimed_by=peer(name))
        adopt(1, one)
        adopt(2, forged(empty))
        tell(2, 0)
        found = look(0)
        assert found == forged(empty)  # there is no other one yet
        adopt(0, found)
        assert not file.exists()  # not by whom it saw
        tell(1, 0)
        found = look(0)
        assert found is not None
        assert (found.tip, found.witness is None) == (one.tip, False)
        adopt(0, found)
        assert file.exists()
        tell(2, 3)
        fooled = look(3)
        assert fooled is not None
        assert fooled.tip == forged(empty).tip  # nobody has told it yet
        adopt(3, fooled)
        tell(1, 3)
        assert look(3) is None  # fewer peers, fewer rounds
        tell(0, 1)
        assert agreements[1].chain.witness is not None  # of its own first commit
        tell(1, 3)  # who tells it on
        assert agreements[3].membership.beginning.witness == agreements[1].chain.witness
        right = look(3)
        assert right is not None
        assert (right.tip, right.witness) == (one.tip, agreements[1].chain.witness)
        adopt(3, right)
        tell(2, 3)
        assert look(3) is None
        assert right.commits[0].commit.previous == GENESIS

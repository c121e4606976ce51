"""Which commits count, and which of two chains wins?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.chain import (
    Backing,
    Chain,
    build_chain,
    is_better,
    num_backed,
    required_signatures,
    verify_commit,
)
from coordinator.records import GENESIS, Commit, Contribution, RecordError, SignedCommit, signature_text
from tests.fakes import NOW, extend, hash_of, identity, make_commit, make_spec, peer, peers, signed_by

EMPTY = Chain(make_spec())
ABC = ["a", "b", "c"]


def test_a_chain_says_where_the_run_stands() -> None:
    assert (EMPTY.round, EMPTY.tip, EMPTY.state_hash) == (0, GENESIS, EMPTY.spec.backbone_hash)
    assert EMPTY.committed_at == EMPTY.spec.created_at
    assert EMPTY.cohort == frozenset()
    one = extend(EMPTY, ABC, committed_at=NOW)
    assert (one.round, one.state_hash, one.committed_at) == (1, hash_of("round 1"), NOW)
    assert one.tip == one.commits[0].commit.hash
    assert one.cohort == set(peers(ABC))
    assert build_chain(EMPTY.spec, one.commits) == one


@pytest.mark.parametrize(("size", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (8, 5)])
def test_more_than_half_must_sign(size: int, needed: int) -> None:
    names = [str(n) for n in range(size)]
    assert required_signatures(names) == needed
    chain = Chain(make_spec(min_peers=1))
    commit = make_commit(chain, names)
    verify_commit(signed_by(commit, names[:needed]), chain)
    with pytest.raises(RecordError, match=f"{needed - 1} of {size} signed; {needed} are needed"):
        verify_commit(signed_by(commit, names[: needed - 1]), chain)


def test_invented_voters_cost_no_more_than_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of them, and a long commit that is written out for each, stopped a peer for 20 s."""
    chain = Chain(make_spec(max_peers=3))
    with pytest.raises(RecordError, match="4 voters, where a round has at most 3"):
        extend(chain, ABC, electorate=list(peers("abcd")))
    num_written, canonical = 0, Commit.canonical

    def counted(self: Commit) -> bytes:
        nonlocal num_written
        num_written += 1
        return canonical(self)

    commit = make_commit(chain, ABC)
    few, all_of_them = signed_by(commit, ["a"]), signed_by(commit, ABC)
    monkeypatch.setattr(Commit, "canonical", counted)
    with pytest.raises(RecordError, match="1 of 3 signed"):
        verify_commit(few, chain)
    assert num_written == 0
    verify_commit(all_of_them, chain)
    assert num_written == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": hash_of("other")}, "another run"),
        ({"round": 2}, "does not follow"),
        ({"previous": hash_of("other")}, "does not follow"),
        ({"electorate": list(peers("aab"))}, "twice in the electorate"),
    ],
)
def test_a_commit_that_does_not_fit(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        extend(EMPTY, ABC, **changes)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c", "d", "e"]])
def test_too_few_or_too_many_contributors(names: list[str]) -> None:
    with pytest.raises(RecordError, match="the spec wants 2 to 4"):
        extend(Chain(make_spec(max_peers=4)), names)


def test_a_contributor_named_twice() -> None:
    commit = make_commit(EMPTY, ABC)
    twice = commit.model_copy(update={"contributors": [*commit.contributors, commit.contributors[0]]})
    with pytest.raises(RecordError, match="contributor is named twice"):
        verify_commit(signed_by(twice, ABC), EMPTY)


def test_the_run_ends() -> None:
    chain = extend(Chain(make_spec(num_rounds=1)), ABC)
    with pytest.raises(RecordError, match="round 2 of a run of 1"):
        extend(chain, ABC)
    back = roll_back(chain, "ab")  # only that may follow
    assert (back.round, back.state_hash) == (2, EMPTY.spec.backbone_hash)
    with pytest.raises(RecordError, match="round 3 of a run of 1"):
        extend(back, ABC)
    with pytest.raises(RecordError):
        roll_back(back, "ab")


def test_weights_are_the_specs() -> None:
    chain = Chain(make_spec(weights="examples", max_weight=4.0))
    good = extend(chain, ABC, num_examples={"a": 0, "b": 50, "c": 2**53})
    assert [c.weight for c in good.commits[0].commit.contributors] == [0.01, 0.5, 4.0]
    commit = make_commit(chain, ABC)
    greedy = commit.contributors[0].model_copy(update={"weight": 1e30})
    commit = commit.model_copy(update={"contributors": [greedy, *commit.contributors[1:]]})
    with pytest.raises(RecordError, match=r"weight 1e\+30 is not what the spec gives"):
        verify_commit(signed_by(commit, ABC), chain)


def test_signatures_that_do_not_count() -> None:
    commit = make_commit(EMPTY, ABC)
    good = signed_by(commit, ABC)
    other = make_commit(EMPTY, ABC, attempt=1)
    for name, signature, reason in [
        ("c", signature_text(other, identity("c")), "does not fit"),  # of another attempt
        ("c", signature_text(commit, identity("b")), "does not fit"),  # of another peer
        ("c", "", "does not fit"),
    ]:
        signed = SignedCommit(commit=commit, signatures={**good.signatures, peer(name): signature})
        with pytest.raises(RecordError, match=reason):
            verify_commit(signed, EMPTY)


def test_the_previous_round_elects() -> None:
    """Newcomers contribute and may sign, but the majority is that of the previous cohort."""
    one = extend(EMPTY, ABC)
    commit = make_commit(one, ["a", "b", "x", "y", "z"], electorate=list(peers(ABC)))
    verify_commit(signed_by(commit, ["a", "b", "x"]), one)
    with pytest.raises(RecordError, match="1 of 3 signed"):
        verify_commit(signed_by(commit, ["a", "x", "y", "z"]), one)
    foreign = make_commit(one, ["a", "b", "x"], electorate=list(peers("abx")))
    with pytest.raises(RecordError, match="mixes the previous round's peers with others"):
        verify_commit(signed_by(foreign, "abx"), one)


def test_a_shorter_electorate_follows_when_others_are_gone() -> None:
    one = extend(EMPTY, ABC)
    two = extend(one, ["c", "d"], electorate=list(peers("c")))
    assert two.cohort == set(peers("cd"))


def test_build_chain_checks_every_commit() -> None:
    two = extend(extend(EMPTY, ABC), ABC)
    with pytest.raises(RecordError, match="does not follow"):
        build_chain(EMPTY.spec, two.commits[1:])
    broken = two.commits[0].model_copy(update={"signatures": {}})
    with pytest.raises(RecordError, match="0 of 3 signed"):
        build_chain(EMPTY.spec, (broken, two.commits[1]))


def test_a_chain_that_goes_on_is_better() -> None:
    one = extend(EMPTY, ABC)
    two = extend(one, ABC)
    assert is_better(one, EMPTY)
    assert is_better(two, one)
    assert is_better(two, EMPTY)
    assert not is_better(one, two)
    assert not is_better(two, two)


def test_fork_the_side_with_more_of_those_who_made_the_last_round_wins() -> None:
    common = extend(EMPTY, ["a", "b", "c", "d", "e"])
    few = branch(common, "ab", "few")
    many = branch(common, "cde", "many")
    assert [chain.backing(chain.round - 1) for chain in (few, many)] == [Backing(2, 2, 2), Backing(2, 2, 3)]
    assert is_better(many, few)
    assert not is_better(few, many)
    longer = extend(extend(few, ["a", "b"]), ["a", "b"])  # it is decided where they part
    assert is_better(many, longer)
    assert not is_better(longer, many)


def test_fork_of_equal_sides_more_contributions_win_then_the_longer_one() -> None:
    common = extend(EMPTY, ["a", "b", "c", "d"])
    left, right = branch(common, "ab", "left"), branch(common, "cd", "right")
    longer = extend(extend(left, ["a", "b"]), ["a", "b"])
    assert is_better(longer, extend(right, ["c", "d"]))
    newcomer = ["c", "d", "x"]  # x counts once it votes
    grown = extend(right, newcomer, electorate=list(peers("cd")))
    assert is_better(longer, grown)
    assert is_better(extend(grown, newcomer), longer)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_fork_made_up_keys_win_nothing_however_many_rounds_they_sign(at: int) -> None:
    """They claim that all who made the last round are gone, as a run of volunteers may find them."""
    honest = EMPTY
    for number in range(4):
        honest = extend(honest, ABC, state_hash=hash_of(f"honest {number}"))
    common = Chain(EMPTY.spec, honest.commits[:at])
    forged = branch(common, "tuvwxyz", "forged")
    while forged.round < EMPTY.spec.num_rounds:
        forged = extend(forged, list("tuvwxyz"))
    assert forged.backing(at) == Backing(0, 0, 7)
    assert is_better(honest, forged)
    assert not is_better(forged, honest)
    assert is_better(extend(common, ABC), forged)  # one round later, too
    assert is_better(forged, common)  # where nobody has gone on, they may have been silent indeed


def test_fork_keys_of_earlier_rounds_win_nothing_over_those_of_the_last() -> None:
    """Somebody took part under one key after the other, and signs with all of them together."""
    chain = extend(EMPTY, ["a", "b", "c", "t"])
    for name in "uv":
        chain = extend(chain, [*ABC, name], electorate=list(peers(ABC)))
    common = extend(chain, ABC, electorate=list(peers(ABC)))
    honest = branch(common, "ab", "honest")
    forged = branch(common, "tuv", "forged")
    assert forged.backing(forged.round - 1) == Backing(0, 2, 3)
    assert honest.backing(honest.round - 1) == Backing(2, 2, 2)
    assert is_better(honest, forged)


def test_fork_where_all_of_the_last_round_are_gone_earlier_members_win_over_strangers() -> None:
    chain = extend(extend(EMPTY, ["a", "b", "c", "d"]), ["c", "d"], electorate=list(peers("cd")))
    back, strangers = branch(chain, "ab", "back"), branch(chain, "tuvwxyz", "strangers")
    assert back.backing(back.round - 1) == Backing(0, 2, 2)
    assert is_better(back, extend(strangers, list("tuvwxyz")))
    padded = branch(chain, "tuvwxyz", "padded", electorate=list(peers("tuvwxyzab")))
    assert padded.backing(padded.round - 1) == Backing(
        0, 0, 7
    )  # five of the nine must sign: none of those who are known


def test_fork_bare_rounds_and_contributors_that_are_only_named_win_nothing() -> None:
    """One of the previous cohort claims that the others are gone, and names eight contributors."""
    common = extend(EMPTY, ["a", "b", "c", "d"])
    honest = extend(common, ["b", "c", "d"], electorate=list(peers("bcd")), state_hash=hash_of("honest"))
    names = ["a", *"tuvwxyz"]
    changes: dict[str, Any] = {"electorate": list(peers("a")), "state_hash": hash_of("padded")}
    with pytest.raises(RecordError, match="2 signatures in all"):  # min_peers: nobody commits alone
        extend(common, names, ["a"], **changes)
    padded = extend(common, names, ["a", "z"], **changes)
    assert len(padded.commits[-1].commit.contributors) == 8
    assert num_backed(padded.commits[-1].commit, common.spec) == 2  # as many as had to sign
    assert num_backed(honest.commits[-1].commit, common.spec) == 3
    assert is_better(honest, padded)
    assert not is_better(padded, honest)


def test_copies_of_one_commit_count_the_same_whatever_signatures_they_carry() -> None:
    commit = make_commit(EMPTY, ["a", "b", "c", "d"])
    copies = [EMPTY.extended(signed_by(commit, names)) for names in ("abcd", "abc", "bcd")]
    again = EMPTY.extended(signed_by(commit.under(7), "abc"))  # signed once more in a later attempt
    rival = extend(EMPTY, ["a", "b", "c"], state_hash=hash_of("rival"))
    for copy in [*copies, again]:
        assert copy.tip == copies[0].tip
        assert is_better(copy, rival)
        assert not any(is_better(copy, other) for other in copies)
    assert commit.under(7).digest != commit.digest  # but a signature of one is none of the other


def branch(chain: Chain, names: str, state: str, **changes: Any) -> Chain:
    """Goes on with these alone, as if nobody else were there."""
    values = {"electorate": list(peers(names)), "state_hash": hash_of(state), **changes}
    return extend(chain, list(names), **values)


def roll_back(chain: Chain, signers: str, contributors: Sequence[str] = (), **changes: Any) -> Chain:
    values = {
        "kind": "rollback",
        "state_hash": chain.before().state_hash,
        "electorate": sorted(chain.cohort),
        "reason": "worse than before",
        **changes,
    }
    return extend(chain, contributors, signers, **values)


def test_a_roll_back_is_a_round_with_the_state_before() -> None:
    one = extend(EMPTY, ABC)
    two = extend(one, ["b", "c", "d"], electorate=list(peers(ABC)))
    back = roll_back(two, "bcd")
    assert (back.round, back.state_hash) == (3, one.state_hash)
    assert back.cohort == two.cohort  # the majority rule goes on
    assert back.is_rolled_back
    assert roll_back(one, "ab").state_hash == EMPTY.spec.backbone_hash  # round 0 included
    on = extend(back, ["b", "c"], electorate=list(peers("bcd")), state_hash=hash_of("round 4"))
    assert on.round == 4
    assert on.cohort == set(peers("bc"))
    assert roll_back(on, "bc").state_hash == one.state_hash  # what round 3 had gone back to


def test_a_roll_back_wins_over_the_chain_without_it_and_weighs_like_its_electorate() -> None:
    common = extend(EMPTY, ["a", "b", "c", "d", "e"])
    back = roll_back(common, "cde", electorate=list(peers("cde")))
    few = extend(common, ["a", "b"], electorate=list(peers("ab")), state_hash=hash_of("few"))
    assert is_better(back, common)
    assert num_backed(back.commits[-1].commit, common.spec) == 3
    assert is_better(back, few)
    assert not is_better(few, back)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state_hash": hash_of("other")}, "returns to the state before it"),
        ({"contributors": ["a"]}, "has no contributors"),
        ({"electorate": list(peers("abcx"))}, "those who made the round"),
        ({"electorate": list(peers("xyz"))}, "those who made the round"),  # also after the last round
    ],
)
def test_a_roll_back_that_does_not_fit(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        roll_back(extend(EMPTY, ABC), "abc", **changes)


def test_a_roll_back_needs_a_majority_and_something_to_undo() -> None:
    one = extend(EMPTY, ABC)
    with pytest.raises(RecordError, match="1 of 3 signed"):
        roll_back(one, "a")
    with pytest.raises(RecordError, match="never the beginning or another roll-back"):
        roll_back(roll_back(one, "abc"), "abc", state_hash=one.state_hash)
    with pytest.raises(RecordError, match="never the beginning"):
        roll_back(EMPTY, "abc", state_hash=EMPTY.state_hash, electorate=list(peers(ABC)))


@pytest.mark.parametrize(
    ("ranges", "is_good"),
    [
        ([], True),
        ([[0, 1], [1, 3], [7, 9]], True),
        ([[1, 1]], False),
        ([[2, 1]], False),
        ([[0, 3], [2, 4]], False),
        ([[4, 5], [0, 1]], False),
    ],
)
def test_missing_parts_are_ranges_in_order(ranges: list[list[int]], is_good: bool) -> None:
    commit = make_commit(EMPTY, ABC)
    values = {**commit.contributors[0].model_dump(mode="json"), "missing": ranges}
    changed = [Contribution.model_validate(values), *commit.contributors[1:]]
    signed = signed_by(commit.model_copy(update={"contributors": changed}), ABC)
    if is_good:
        verify_commit(signed, EMPTY)
    else:
        with pytest.raises(RecordError, match="not in order"):
            verify_commit(signed, EMPTY)


def test_who_is_excluded_is_named_once_and_contributes_nothing() -> None:
    named = {"peer": peer("x"), "reason": "sent values that are not finite"}
    chain = extend(EMPTY, ABC, excluded=[named])
    assert chain.commits[0].commit.excluded[0].peer == peer("x")
    with pytest.raises(RecordError, match="excluded twice"):
        extend(EMPTY, ABC, excluded=[named, named])
    with pytest.raises(RecordError, match="a contributor is excluded"):
        extend(EMPTY, ABC, excluded=[{**named, "peer": peer("a")}])


def test_a_commit_with_more_signatures_than_peers_is_no_place_to_store_data() -> None:
    chain = Chain(make_spec(max_peers=3))
    commit = make_commit(chain, ABC)
    crowd = [*ABC, *(f"x{n}" for n in range(7))]
    with pytest.raises(RecordError, match="10 signatures, where at most 9"):
        verify_commit(signed_by(commit, crowd), chain)


def test_fork_of_equal_weight_the_smaller_hash_wins() -> None:
    forks = [extend(EMPTY, ABC, state_hash=hash_of(str(n))) for n in range(4)]
    best = min(forks, key=lambda chain: chain.tip)
    for fork in forks:
        assert not is_better(fork, best)
        assert is_better(best, fork) == (fork is not best)


def test_a_liar_in_a_partition_leads_nobody_in_a_circle() -> None:
    """A sum over all rounds since the fork, with the backing of the first alone, would: z, y, x and so on"""
    common = extend(EMPTY, ["a", "b", "c", "d"])
    x = extend(branch(common, "ab", "x"), ["a", "b"])
    y = branch(common, "cd", "y")
    z = branch(y, "dt", "z", electorate=[peer("d")])  # d lies that c is gone, and brings made-up keys
    y = extend(y, ["c", "d"])
    for electorate in ("dt", "dtuvwxyz"):
        z = extend(z, list("dtuvwxyz"), electorate=list(peers(electorate)))
    assert sum(z.backing(index).contributors for index in range(1, z.round)) > 4  # those of x, and of y
    for honest in (x, y):
        assert is_better(honest, z)
        assert not is_better(z, honest)


BRANCHES = st.lists(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=4, unique=True), max_size=3)


@given(st.lists(st.tuples(st.integers(0, 99), BRANCHES), min_size=3, max_size=3))
def test_chains_are_in_one_order(forks: list[tuple[int, list[list[str]]]]) -> None:
    """Of two at most one is better, and no three beat each other in a circle, wherever they part."""
    trunk = extend(extend(EMPTY, list("abcdef")), list("abcdef"))
    chains = [trunk]
    for index, (where, rounds) in enumerate(forks):
        chain = chains[where % len(chains)]
        chain = Chain(chain.spec, chain.commits[: 1 + where % max(1, chain.round)])
        for contributors in rounds:
            if chain.round == chain.spec.num_rounds:
                break
            electorate = sorted(chain.cohort & set(peers(contributors))) or list(peers(contributors))
            chain = extend(
                chain,
                contributors,
                [name for name in "abcdef" if name in contributors or peer(name) in electorate],
                electorate=electorate,
                state_hash=hash_of(f"{index} {contributors}"),
            )
        chains.append(chain)
    tips = {chain.tip: chain for chain in chains}
    for one, other in itertools.combinations(tips.values(), 2):
        assert is_better(one, other) != is_better(other, one)
    for first, second, third in itertools.permutations(tips.values(), 3):
        if is_better(first, second) and is_better(second, third):
            assert is_better(first, third)

"""Is what compression cuts off kept, sent later, and counted once?"""

from __future__ import annotations

import pytest
import torch

from peer.compression import CODECS
from peer.feedback import ErrorFeedback
from peer.manifest import Outgoing, prepare
from tests.fakes import hash_of, identity

SIZE = 2500  # parts of 1024, 1024 and 452 values


def make_outgoing(delta: torch.Tensor, codec: str) -> Outgoing:
    return prepare(
        delta, CODECS[codec], identity("a"), run=hash_of("run"), round=1, previous=hash_of("previous")
    )


def arrives(outgoing: Outgoing) -> torch.Tensor:
    return torch.cat([outgoing.decoded(part) for part in range(outgoing.grid.num_parts)])


def test_what_was_cut_off_moves_to_the_next_delta() -> None:
    feedback = ErrorFeedback(sent=torch.tensor([0.5, -1.0]))
    delta = torch.tensor([1.0, 2.0])
    assert feedback.add_to(delta) is delta
    assert delta.tolist() == [1.5, 1.0]
    assert feedback.sent is None
    assert feedback.add_to(delta).tolist() == [1.5, 1.0]  # it does not count twice


def test_a_commit_leaves_what_its_encoding_lost() -> None:
    """int8 in steps of 1: a quarter is lost."""
    delta = torch.full((SIZE,), 0.25)
    delta[::64] = 127.0
    outgoing = make_outgoing(delta.clone(), "int8")
    feedback = ErrorFeedback()
    feedback.committed(delta.clone(), outgoing, [], {})
    assert feedback.sent is not None
    expected = torch.full((SIZE,), 0.25)
    expected[::64] = 0.0
    assert feedback.sent.tolist() == expected.tolist()


def test_parts_that_are_in_no_result_are_kept_whole() -> None:
    delta = torch.full((SIZE,), 0.25)
    delta[::64] = 127.0
    outgoing = make_outgoing(delta.clone(), "int8")
    feedback = ErrorFeedback()
    feedback.committed(delta.clone(), outgoing, [(1, 2)], {})
    assert feedback.sent is not None
    assert feedback.sent[1024:2048].tolist() == delta[1024:2048].tolist()
    assert feedback.sent[0].item() == feedback.sent[2048].item() == 0.0
    feedback = ErrorFeedback()
    feedback.committed(delta.clone(), outgoing, [(0, 1), (1, 3)], {})
    assert feedback.sent is not None
    assert feedback.sent.tolist() == delta.tolist()


def test_nothing_is_lost_by_a_lossless_codec() -> None:
    delta = torch.ones(SIZE)
    feedback = ErrorFeedback()
    feedback.committed(delta, make_outgoing(delta, "fp32"), [], {})
    assert feedback.sent is None


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "int4", "topk"])
def test_over_30_rounds_of_which_some_come_to_nothing(codec: str) -> None:
    """Deltas in equals what arrived and what is left; parts go missing, and attempts fail."""
    generator = torch.Generator().manual_seed(3)
    feedback = ErrorFeedback()
    put_in, arrived = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    kept: torch.Tensor | None = None
    for round_ in range(30):
        delta = torch.randn(SIZE, generator=generator)
        put_in += delta.double()
        total = feedback.add_to(delta if kept is None else delta + kept)
        kept = None
        if round_ % 7 == 3:
            kept = total  # no commit: the whole delta waits, with what was cut off before
            continue
        outgoing = make_outgoing(total.clone(), codec)
        missing = [(0, 2)] if round_ % 5 == 1 else []
        sent = arrives(outgoing).double()
        sent[: 2048 * len(missing)] = 0.0
        arrived += sent
        feedback.committed(total, outgoing, missing, {})
    assert kept is None
    assert feedback.sent is not None
    torch.testing.assert_close(arrived + feedback.sent.double(), put_in, rtol=0, atol=1e-3)


def test_residuals_of_a_reducer_change_with_a_commit_alone() -> None:
    """By part: another reducer's parts, once reduced here, stay until they are again."""
    before = {3: torch.tensor([1.0]), 4: torch.tensor([2.0])}
    feedback = ErrorFeedback(reduced=before)
    delta = torch.ones(4)
    feedback.committed(delta, make_outgoing(delta, "fp32"), [], {4: torch.tensor([5.0])})
    assert {part: values.tolist() for part, values in feedback.reduced.items()} == {3: [1.0], 4: [5.0]}
    assert before[4].tolist() == [2.0]


def test_who_was_overtaken_drops_what_it_holds_as_a_reducer_and_nothing_else() -> None:
    feedback = ErrorFeedback(torch.tensor([1.0]), {3: torch.tensor([2.0])})
    kept = dict(feedback.reduced)  # of the round that is being audited
    feedback.forget_reduced()
    assert feedback.reduced == {}
    assert feedback.sent is not None
    assert list(kept) == [3]


def test_through_a_checkpoint() -> None:
    feedback = ErrorFeedback(torch.tensor([1.0, 2.0]), {12: torch.tensor([3.0]), 4095: torch.tensor([4.0])})
    names = feedback.reduced_by_name()
    assert list(names) == ["part.00012", "part.04095"]
    back = ErrorFeedback.of(feedback.sent, names)
    assert back.sent is not None
    assert back.sent.tolist() == [1.0, 2.0]
    assert {part: values.tolist() for part, values in back.reduced.items()} == {12: [3.0], 4095: [4.0]}
    assert ErrorFeedback.of(None, {}).reduced == {}

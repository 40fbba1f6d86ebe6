"""What is believed of a client: who it is, and how much it counts for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.errors import ClientError
from fedprune.exchange.gate import Gate, capped
from fedprune.exchange.messages import ClientInfo, Expected, Reply, Request, describe_reply
from sparsemodel.runtime.fixed_sum import MAX_TOTAL_WEIGHT

SHARES = {c: ClientInfo(c, 90, 10, [60, 40]) for c in range(3)}


def gate(*, own_data: bool, max_share: float = 0.5) -> Gate:
    return Gate(num_clients=3, num_classes=2, shares=SHARES, own_data=own_data, max_share=max_share)


def test_a_share_that_the_run_handed_out_is_known() -> None:
    strict = gate(own_data=False)
    for info in SHARES.values():
        assert strict.admit(describe_reply(info)) == info
        strict.know(info)
    assert strict.weights([0, 2], on="train") == {0: 90, 2: 90}
    assert strict.weights([1], on="dev") == {1: 10}
    for other in (ClientInfo(1, 91, 9, [60, 40]), ClientInfo(1, 90, 10, [40, 60])):
        with pytest.raises(ClientError, match="other samples than its share: it says"):
            strict.admit(describe_reply(other))


def test_samples_of_its_own_count_up_to_a_share_of_the_round() -> None:
    """900 among 90 and 90 at one half: as many as the two; believed as they are at 1."""
    for max_share, weight in ((0.5, 180), (0.25, 60), (1.0, 900)):
        open_gate = gate(own_data=True, max_share=max_share)
        for info in (SHARES[0], SHARES[1], ClientInfo(2, 900, 100, [1000, 0])):
            open_gate.know(open_gate.admit(describe_reply(info)))
        assert open_gate.weights([0, 1, 2], on="train") == {0: 90, 1: 90, 2: weight}
        assert open_gate.weights([2], on="train") == {2: 900}
        request = Request("ask", expected=Expected())
        assert open_gate.check(2, Reply(900), request, weight).weight == weight
        with pytest.raises(ClientError, match="for 90 samples, and the client has 900"):
            open_gate.check(2, Reply(90), request, weight)


def test_what_all_announce_together_can_be_added_up() -> None:
    most = MAX_TOTAL_WEIGHT // 3
    open_gate = gate(own_data=True)
    assert open_gate.admit(describe_reply(ClientInfo(0, most - 10, 10, [most, 0])))
    for many in (most + 1, 2**53 - 20):
        with pytest.raises(ClientError, match=f"equal sums, at most {most}"):
            open_gate.admit(describe_reply(ClientInfo(0, many - 10, 10, [many, 0])))


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    st.integers(0, 8),
    st.floats(0.01, 1.0),
)
def test_a_cap_holds_where_it_can_and_touches_nobody_else(
    counts: list[int], num_own: int, max_share: float
) -> None:
    samples = dict(enumerate(counts))
    own = list(samples)[:num_own]
    weights = capped(samples, own, max_share)
    total = sum(weights.values())
    for client, count in samples.items():
        assert 1 <= weights[client] <= count
        assert client in own or weights[client] == count
        if weights[client] < count:  # as much as is allowed, to the rounding of whole numbers
            assert weights[client] <= max(1, max_share * total + 1)
    cut = [client for client in own if weights[client] < samples[client]]
    assert len({weights[client] for client in cut}) <= 1
    rest = total - sum(weights[client] for client in own)
    if rest and len(own) * max_share < 1:
        for client in own:
            assert weights[client] <= max(1, max_share * total + 1)
    if max_share == 1.0 or not own:
        assert weights == samples

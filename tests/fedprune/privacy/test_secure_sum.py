"""The protocol of a secure sum: right with whoever stays, and nothing but the sum to be seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import SESSION, Party, ready
from scipy import stats

from fedprune.errors import ClientError
from fedprune.privacy import secure_sum
from fedprune.privacy.randomness import Stream as KeyStream
from fedprune.privacy.randomness import Words, gaussian, packed, seeded_key, unpacked
from fedprune.privacy.secure_sum import SECRET


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_sum_is_that_of_whoever_stays(data: st.DataObject) -> None:
    """Clients may leave at every step; below the threshold nobody's secrets are told."""
    num = data.draw(st.integers(2, 8))
    share = data.draw(st.sampled_from([0.3, 0.5, 0.66]))
    width = data.draw(st.integers(5, 8))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    party = Party(num, share)

    def some(clients: list[int]) -> list[int]:
        kept = data.draw(st.lists(st.sampled_from(clients), unique=True, min_size=1))
        return sorted(kept) if data.draw(st.booleans()) else clients

    with_keys = some(list(range(num)))
    party.advertise(with_keys)
    threshold = party.threshold
    if len(with_keys) < threshold:
        with pytest.raises(ClientError, match=f"{len(with_keys)} clients, expected at least"):
            party.exchange(with_keys)
        return
    party.exchange(some(with_keys))
    sharing = list(party.announced)
    vectors = {c: draw.integers(0, 2**64, 17, dtype=np.uint64) for c in sharing}
    if len(sharing) < threshold:
        with pytest.raises(ClientError, match=f"{len(sharing)} clients are left, and {threshold}"):
            party.mask(sharing[0], vectors[sharing[0]], width)
        return
    masked = {c: party.mask(c, vectors[c], width) for c in sharing}
    survivors = some(sharing)
    answering = some(survivors)
    if len(survivors) < threshold:
        with pytest.raises(ClientError, match=f"and {threshold} are needed"):
            party.unmask(answering[0], survivors)
        return
    told = {c: party.unmask(c, survivors) for c in answering}
    total = sum((unpacked(masked[c], width) for c in survivors), np.zeros(17, np.uint64))
    if len(answering) < threshold:
        with pytest.raises(ClientError, match=f"{len(answering)} of {threshold} shares"):
            party.unmasked(total, told, survivors, width)
        return
    expected = sum((vectors[c] for c in survivors), np.zeros(17, np.uint64))
    found = party.unmasked(total, told, survivors, width)
    assert np.array_equal(found, expected & np.uint64(2 ** (8 * width) - 1))
    assert all(SECRET not in party.kept[c] for c in answering)


def test_what_a_server_sees_is_uniform() -> None:
    """Eight clients send zeros but for a pattern. Of all subsets of their masked vectors that the
    server can add up, only the whole one shows it: bytes of the others are uniform (chi-square),
    and not correlated with what was sent."""
    size, width, num = 40_000, 6, 8
    party = ready(num)
    secret = np.zeros(size, np.uint64)
    secret[::2] = 2**47 - 1
    masked = {c: unpacked(party.mask(c, secret, width), width) for c in range(num)}
    told = {c: party.unmask(c, list(range(num))) for c in range(num)}
    views: dict[str, Words] = {f"client {c}": words for c, words in masked.items()}
    for count in range(2, num):
        views[f"sum of {count}"] = sum((masked[c] for c in range(count)), np.zeros(size, np.uint64))
    total = sum(masked.values(), np.zeros(size, np.uint64))
    views["sum of all, masked by their seeds"] = total.copy()
    for a, b in ((0, 1), (3, 6)):
        views[f"difference of {a} and {b}"] = masked[a] - masked[b]
    p_values = {}
    for name, words in views.items():
        data = np.frombuffer(packed(words, width), np.uint8)
        p_values[name] = stats.chisquare(np.bincount(data, minlength=256)).pvalue
        shown = (words & np.uint64(2**48 - 1)).astype(np.float64)
        correlation, p_values[f"{name}, correlation"] = stats.pearsonr(shown, secret)
        assert abs(correlation) < 5 / size**0.5
    # 34 tests of fresh keys: the smallest of that many uniform p-values is below this once in 10^6.
    assert min(p_values.values()) > 1e-6 / len(p_values)
    # The seeds alone, of which the server may be told, take only the outer masks of a client away.
    single = masked[0].copy()
    own = {c: answer[0] for c, answer in told.items()}
    seed = secure_sum.combine_shares(list(own.values())[: party.threshold])
    secure_sum.add_masks(single, seed, width, sign=-1)
    data = np.frombuffer(packed(single, width), np.uint8)
    assert stats.chisquare(np.bincount(data, minlength=256)).pvalue > 1e-6
    found = party.unmasked(total, told, list(range(num)), width)
    assert np.array_equal(found, num * secret & np.uint64(2**48 - 1))


def test_keys_and_masks_are_fresh_every_time() -> None:
    words = np.zeros(50, np.uint64)
    seen = set()
    for _ in range(3):
        party = ready(2)
        seen |= {*party.publics.values(), *(party.mask(c, words, 8) for c in range(2))}
    assert len(seen) == 3 * 4


def test_a_vector_goes_out_once() -> None:
    """Two under the same masks would tell their difference."""
    party = ready(3)
    words = np.zeros(4, np.uint64)
    party.mask(0, words, 8)
    with pytest.raises(ClientError, match="a vector was sent already"):
        party.mask(0, words + np.uint64(1), 8)


def test_a_client_never_tells_both_secrets_of_another() -> None:
    """One list decides between seed and key, one answer is given, and nothing is left of it."""
    party = ready(4)
    words = np.zeros(4, np.uint64)
    for client in range(4):
        party.mask(client, words, 8)
    told = party.unmask(0, [0, 1, 2])
    assert set(told) == {0, 1, 2, 3}
    for survivors in ([0, 1, 3], [0, 1, 2]):
        with pytest.raises(ClientError, match="its keys are not here"):
            party.unmask(0, survivors)
    assert party.kept[0] == {}
    # What it told is the seed's share for who stayed and the key's for who left.
    shares = {c: party.unmask(c, [0, 1, 2]) for c in (1, 2)} | {0: told}
    seed = secure_sum.combine_shares([shares[c][1] for c in range(3)])
    assert secure_sum.commitment(seed) == party.announced[1].commitment
    key = secure_sum.combine_shares([shares[c][3] for c in range(3)])
    assert secure_sum.public_bytes(secure_sum._private(key.hex())) == party.publics[3][32:]


@pytest.mark.parametrize(
    ("survivors", "message"),
    [
        ([0, 1, 2, 2], "expected clients among"),  # counted twice to reach the threshold
        ([0, 1, 2, 7], "expected clients among"),
        ([1, 2, 3], "expected clients among"),  # without the client that is asked
        ([0, 1], "2 clients are left, and 3 are needed"),
        ([0], "1 clients are left, and 3 are needed"),
        ([], "expected clients among"),
    ],
)
def test_hostile_survivors_are_refused(survivors: list[int], message: str) -> None:
    party = ready(4)
    party.mask(0, np.zeros(4, np.uint64), 8)
    with pytest.raises(ClientError, match=message):
        party.unmask(0, survivors)
    assert SECRET not in party.kept[0]  # whoever asked once in the wrong way gets nothing more


def test_hostile_lists_of_keys_are_refused() -> None:
    party = Party(4)
    party.advertise([0, 1, 2, 3])
    own = party.publics[0]

    def share(publics: dict[int, bytes], at_least: int = 2) -> None:
        secure_sum.share(
            party.kept[0], SESSION, publics, weight=1, at_least=at_least, threshold_share=0.5
        )

    with pytest.raises(ClientError, match="does not hold this client's"):
        share({**party.publics, 0: party.publics[1]})
    with pytest.raises(ClientError, match="does not hold this client's"):
        share({c: keys for c, keys in party.publics.items() if c})
    with pytest.raises(ClientError, match="two clients with the same keys"):
        share({**party.publics, 2: party.publics[1]})
    with pytest.raises(ClientError, match="1 clients, expected at least 2"):
        share({0: own})
    with pytest.raises(ClientError, match="4 clients, expected at least 5"):
        share(party.publics, at_least=5)
    with pytest.raises(ClientError, match="a public key that is none"):
        share({**party.publics, 3: bytes(64)})  # of small order: the same secret for everybody
    share(party.publics)
    with pytest.raises(ClientError, match="shares were given already"):
        share(party.publics)
    for step in (
        lambda: secure_sum.mask(
            party.kept[0], "another", np.zeros(1, np.uint64), clients=[0, 1, 2], width=8
        ),
        lambda: secure_sum.unmask(party.kept[0], "another", [0, 1, 2], {}),
    ):
        with pytest.raises(ClientError, match="its keys are not here"):
            step()


def test_hostile_masks_are_refused() -> None:
    party = ready(4)
    words = np.zeros(1, np.uint64)
    for clients, message in (
        ([0, 1], "2 clients are left, and 3 are needed"),
        ([1, 2, 3], "expected clients among"),
        ([0, 1, 9], "expected clients among"),
        ([0, 1, 1], "expected clients among"),
    ):
        with pytest.raises(ClientError, match=message):
            secure_sum.mask(party.kept[0], SESSION, words, clients=clients, width=8)
    assert not words.any()


def test_damaged_shares_are_noticed() -> None:
    party = ready(4)
    words = np.zeros(4, np.uint64)
    for client in range(4):
        party.mask(client, words, 8)
    mine = {c: party.sealed[c][0] for c in (1, 2, 3)}
    with pytest.raises(ClientError, match="the shares of client 2 are damaged"):
        secure_sum.unmask(party.kept[0], SESSION, [0, 1, 2], {**mine, 2: mine[1]})
    told = {c: party.unmask(c, [0, 1, 2]) for c in (1, 2, 3) if c != 3}
    third = ready(4)  # a liar's shares: right in form, of another secret
    for client in range(4):
        third.mask(client, words, 8)
    told[3] = third.unmask(3, [0, 1, 3])
    with pytest.raises(ClientError, match="wrong shares of"):
        party.unmasked(words.copy(), told, [0, 1, 2], 8)


def test_words_are_packed_to_their_width() -> None:
    words = np.array([0, 1, 2**40 - 1, 2**64 - 1], np.uint64)
    assert packed(words[:3], 5) == bytes(5) + b"\x01" + bytes(4) + b"\xff" * 5
    for width in (5, 6, 7, 8):
        found = unpacked(packed(words, width), width)
        assert np.array_equal(found, words & np.uint64(2 ** (8 * width) - 1))


def test_the_key_stream_is_that_of_rfc_8439() -> None:
    """The first block of a key of zeros, appendix A.1, test vector 1."""
    block = KeyStream(bytes(32)).take(64).hex()
    assert block.startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")


def test_draws_are_normal() -> None:
    """200,000 seeded draws by Kolmogorov and Smirnov, and their moments."""
    draws = gaussian(KeyStream(seeded_key("a test", 1)), 200_000)
    assert stats.kstest(draws, "norm").pvalue > 0.001
    assert abs(draws.mean()) < 4 / 200_000**0.5
    assert abs(draws.std() - 1) < 4 / (2 * 200_000) ** 0.5
    assert len(gaussian(KeyStream(seeded_key("a test", 1)), 7)) == 7

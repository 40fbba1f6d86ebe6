"""Sums of clients' vectors of which a server learns nothing but the sum, also if clients leave.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017,
against a server that follows the protocol and is curious. Of each client u of one sum:

1. keys: two fresh key pairs (X25519), one for messages between clients, one for masks.
2. shares: its mask key and a random seed, each split by Shamir among all who sent keys, so that
   `threshold` of them can put it together; encrypted for each (ChaCha20-Poly1305).
3. masked: its vector, plus the mask of its seed, plus or minus a mask that it has in common with
   each other client of the sum, by the smaller number. Pairs cancel in the sum.
4. unmask: for those whose vector arrived its share of their seed, for the others its share of
   their mask key. Never both: there is one list, and one answer.

Key agreement, key derivation, ciphers and secret sharing are those of `cryptography` and of
Flower. Departs from the paper: shares travel to their owners with question 4, where they are
needed; a client commits to its seed, so that a wrong share is noticed; keys are not signed.

The client's half works on a dictionary of bytes that outlives its messages (`Local.kept`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares

from fedprune.errors import ClientError
from fedprune.privacy.randomness import KEY_BYTES, Words, add_masks, new_key, packed

SECRET = "secret:sum"
PUBLIC_BYTES = 2 * KEY_BYTES
SHARE_BYTES = 52  # of 32 bytes by Flower: a number, and three blocks of 16
SEALED_BYTES = 2 * SHARE_BYTES + 16
_NONCE = bytes(12)  # each key seals one message


def threshold_of(num_clients: int, share: float) -> int:
    """How many clients must stay until the end: more than that share of all, at least two.

    >>> threshold_of(8, 0.5), threshold_of(2, 0.5)
    (5, 2)
    """
    return max(2, int(share * num_clients) + 1)


# --- a client's half ---------------------------------------------------------------------------


@dataclass
class Secrets:
    """What a client keeps between the messages of one sum; all of it is gone at its end.

    Attributes:
        session: names the sum.
        own: the client's number.
        talk, mask: its private keys.
        publics: client -> both public keys, of those that can take part.
        threshold: how many have to stay.
        weight: what its vector counts for.
        seed: of its own mask.
        share: its own share of its seed.
        clients: those under whose masks its vector went out; empty before.
    """

    session: str
    own: int
    talk: str
    mask: str
    publics: dict[int, str] = field(default_factory=dict)
    threshold: int = 0
    weight: int = 0
    seed: str = ""
    share: str = ""
    clients: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, kept: Mapping[str, bytes], session: str) -> Secrets:
        """Those of a sum.

        Raises:
            ClientError: it has begun none of that name, or has lost them.
        """
        values: dict[str, Any] = json.loads(kept.get(SECRET, b'{"session": null}'))
        if values["session"] != session:
            raise ClientError(f"secure sum {session!r:.60}: its keys are not here (any more)")
        values["publics"] = {int(client): keys for client, keys in values["publics"].items()}
        return cls(**values)

    def keep(self, kept: dict[str, bytes]) -> None:
        """Leave them for the next message."""
        kept[SECRET] = json.dumps(asdict(self)).encode()

    def pair_key(self, other: int, use: str) -> bytes:
        """What it has in common with another client for one use."""
        own, place = (self.talk, 0) if use.startswith("talk") else (self.mask, 1)
        public = bytes.fromhex(self.publics[other])
        theirs = public[place * KEY_BYTES : (place + 1) * KEY_BYTES]
        return agreed(bytes.fromhex(own), theirs, self.session, use)


def advertise(kept: dict[str, bytes], session: str, own: int) -> bytes:
    """Begin a sum: two fresh key pairs, of which this gives the public keys, 64 bytes."""
    talk, mask = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    private = (key.private_bytes_raw().hex() for key in (talk, mask))
    Secrets(session, own, talk=next(private), mask=next(private)).keep(kept)
    return public_bytes(talk) + public_bytes(mask)


def share(
    kept: dict[str, bytes],
    session: str,
    publics: Mapping[int, bytes],
    *,
    weight: int,
    at_least: int,
    threshold_share: float,
) -> tuple[bytes, dict[int, bytes]]:
    """Split the secrets among those who sent keys.

    Args:
        publics: client -> its public keys, the own ones among them.
        weight: what this client's vector will count for.
        at_least: how many they have to be.
        threshold_share: of them, more than which has to stay.

    Returns:
        A commitment to the seed, 32 bytes, and for each other client its sealed shares.

    Raises:
        ClientError: too few, a key that is none, the own ones are missing or others', or the
            question came before.
    """
    own = Secrets.of(kept, session)
    mine = _private(own.talk), _private(own.mask)
    if own.seed:
        raise ClientError("secure sum: shares were given already")
    if publics.get(own.own) != b"".join(public_bytes(key) for key in mine):
        raise ClientError("secure sum: the list of keys does not hold this client's")
    threshold = threshold_of(len(publics), threshold_share)
    if len(publics) < max(at_least, threshold):
        raise ClientError(
            f"secure sum: {len(publics)} clients, expected at least {max(at_least, threshold)}"
        )
    if len(set(publics.values())) < len(publics):
        raise ClientError("secure sum: two clients with the same keys")
    own.publics = {client: keys.hex() for client, keys in sorted(publics.items())}
    own.threshold, own.weight, seed = threshold, weight, new_key()
    own.seed = seed.hex()
    seeds = create_shares(seed, threshold, len(publics))
    masks = create_shares(bytes.fromhex(own.mask), threshold, len(publics))
    sealed = {}
    for client, seed_share, mask_share in zip(own.publics, seeds, masks, strict=True):
        if client == own.own:
            own.share = seed_share.hex()
        else:
            key = own.pair_key(client, f"talk {own.own} {client}")
            sealed[client] = ChaCha20Poly1305(key).encrypt(_NONCE, seed_share + mask_share, None)
    own.keep(kept)
    return commitment(seed), sealed


def weight_of(kept: Mapping[str, bytes], session: str) -> int:
    """What the client's vector counts for in a sum.

    Raises:
        ClientError: it has begun none of that name.
    """
    return Secrets.of(kept, session).weight


def mask(
    kept: dict[str, bytes], session: str, words: Words, *, clients: Collection[int], width: int
) -> bytes:
    """The vector under masks, `width` bytes a word.

    Args:
        words: uint64 [n], which are changed.
        clients: whose masks it takes, the client itself among them.

    Raises:
        ClientError: too few, unknown or doubled clients, or a vector went out before: two under
            the same mask would tell their difference.
    """
    own = Secrets.of(kept, session)
    if own.clients:
        raise ClientError("secure sum: a vector was sent already")
    _check_listed(clients, own, own.publics)
    own.clients = sorted(clients)
    own.keep(kept)
    add_masks(words, bytes.fromhex(own.seed), width, sign=1)
    for client in own.clients:
        if client != own.own:
            sign = 1 if own.own < client else -1
            add_masks(words, own.pair_key(client, "mask"), width, sign=sign)
    return packed(words, width)


def unmask(
    kept: dict[str, bytes], session: str, survivors: Collection[int], sealed: Mapping[int, bytes]
) -> dict[int, bytes]:
    """The end of a sum: a share of each client's seed or mask key. All secrets are forgotten.

    Args:
        survivors: whose vectors arrived; their seeds are told, of all others the mask keys.
        sealed: client -> what it sealed for this one.

    Raises:
        ClientError: survivors that are too few, unknown, doubled or without this client, or
            shares that cannot be opened. The secrets are forgotten all the same.
    """
    own = Secrets.of(kept, session)
    del kept[SECRET]
    _check_listed(survivors, own, own.clients)
    told = {}
    for client in own.clients:
        if client == own.own:
            told[client] = bytes.fromhex(own.share)
            continue
        key = own.pair_key(client, f"talk {client} {own.own}")
        try:
            both = ChaCha20Poly1305(key).decrypt(_NONCE, sealed[client], None)
        except (KeyError, InvalidTag):
            raise ClientError(f"secure sum: the shares of client {client} are damaged") from None
        told[client] = both[:SHARE_BYTES] if client in survivors else both[SHARE_BYTES:]
    return told


def _check_listed(listed: Collection[int], own: Secrets, known: Collection[int]) -> None:
    distinct = set(listed)
    if len(distinct) != len(listed) or not distinct <= set(known) or own.own not in distinct:
        raise ClientError(f"secure sum: expected clients among {list(known)}, got {listed!r:.90}")
    if not own.threshold <= len(distinct):
        raise ClientError(
            f"secure sum: {len(distinct)} clients are left, and {own.threshold} are needed"
        )


# --- the server's half -------------------------------------------------------------------------


@dataclass(frozen=True)
class Announced:
    """What a client told everybody: its public keys, and what it is bound to as its seed."""

    publics: bytes
    commitment: bytes


def remove_masks(
    total: Words,
    told: Mapping[int, Mapping[int, bytes]],
    *,
    session: str,
    announced: Mapping[int, Announced],
    survivors: Collection[int],
    threshold: int,
    width: int,
) -> None:
    """Take all masks out of the sum of the survivors' vectors, in place.

    Args:
        total: their sum modulo 2^64.
        told: client -> its answer to `unmask`.
        announced: of those that masked with each other.
        threshold: how many shares make a secret.

    Raises:
        ClientError: too few answers, or shares that do not make what was announced.
    """
    if len(told) < threshold:
        raise ClientError(f"secure sum: {len(told)} of {threshold} shares to take masks away")
    for client, words in announced.items():
        shares = [answer[client] for answer in told.values() if client in answer][:threshold]
        secret = _combined(client, shares, threshold)
        if client in survivors:
            if commitment(secret) != words.commitment:
                raise ClientError(f"secure sum: wrong shares of the seed of client {client}")
            add_masks(total, secret, width, sign=-1)
            continue
        if public_bytes(_private(secret.hex())) != words.publics[KEY_BYTES:]:
            raise ClientError(f"secure sum: wrong shares of the key of client {client}")
        for other in survivors:
            theirs = announced[other].publics[KEY_BYTES:]
            sign = -1 if other < client else 1  # the opposite of what the survivor added
            add_masks(total, agreed(secret, theirs, session, "mask"), width, sign=sign)


def commitment(seed: bytes) -> bytes:
    """What binds a client to its seed and tells nothing of it."""
    return hashlib.sha256(b"fedprune seed" + seed).digest()


def agreed(private: bytes, public: bytes, session: str, use: str) -> bytes:
    """The key that the owners of two key pairs have in common for one use in one sum.

    Raises:
        ClientError: the public key is none.
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise ClientError("secure sum: a public key that is none") from None
    info = f"fedprune secure sum {session} {use}".encode()
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def check_publics(publics: bytes) -> None:
    """Raise ClientError unless others can agree on keys with both of a client's public keys: with
    one that is none, every honest client would refuse the sum."""
    for public in (publics[:KEY_BYTES], publics[KEY_BYTES:]):
        agreed(new_key(), public, "", "")


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The public key of a private one, 32 bytes."""
    return key.public_key().public_bytes_raw()


def _private(text: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


def _combined(client: int, shares: list[bytes], threshold: int) -> bytes:
    numbers = {some[:4] for some in shares}
    if len(numbers) < threshold or any(len(some) != SHARE_BYTES for some in shares):
        raise ClientError(f"secure sum: too few or damaged shares of client {client}")
    try:
        secret = combine_shares(shares)
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise ClientError(f"secure sum: wrong shares of client {client}")
    return secret

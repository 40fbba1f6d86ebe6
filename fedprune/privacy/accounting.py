"""What a run's noise amounts to: epsilon at delta, by Google's accountant (`dp-accounting`).

Neighbours are runs in which one client's data are others (replace one). One client moves the sum
of clipped updates by 2 · clip then, so noise of deviation z · clip has the multiplier z / 2 of that
sensitivity. "central" composes, for each round, a Gaussian mechanism on a sample of fixed size
without replacement (Wang, Balle, Kasiviswanathan, AISTATS 2019), or on all clients where all are
asked; it assumes that nobody knows who was drawn, and that who does not answer is no matter of its
data. "local" composes a Gaussian mechanism for each answer of the client that answers most often.
"""

from __future__ import annotations

from fedprune.errors import ConfigError
from fedprune.settings import PrivacyConfig


def epsilon(privacy: PrivacyConfig, *, releases: int, asked: int, clients: int) -> float:
    """Epsilon at `privacy.delta`.

    Args:
        releases: rounds ("central"), or answers of one client ("local").
        asked: clients of a round.
        clients: of whom they are drawn.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    try:
        import dp_accounting  # noqa: PLC0415
        from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "privacy.dp needs the accountant dp-accounting: pip install 'fedprune[privacy]'"
        ) from None
    everybody = dp_accounting.GaussianDpEvent(privacy.noise_multiplier / 2)
    events = [everybody]
    if privacy.dp == "central" and asked < clients:
        events += [dp_accounting.SampledWithoutReplacementDpEvent(clients, asked, everybody)]
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    accounts = [
        RdpAccountant(neighboring_relation=relation).compose(event, releases) for event in events
    ]
    # The bound for samples is the worse one where there is little noise; drawing costs nothing.
    return min(float(account.get_epsilon(privacy.delta)) for account in accounts)

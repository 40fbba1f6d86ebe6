"""`python -m fedprune.rounds.divide FOLDER < CONFIG.json`: divide a run's data among its clients.

Clients without torch start it where nobody has divided the data for them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedprune.config import RunConfig
from fedprune.errors import USER_ERRORS
from fedprune.rounds.workspace import open_workspace


def main() -> None:
    """Write the store; one line of an error that a user can mend."""
    try:
        config = RunConfig.parse(json.load(sys.stdin))
        open_workspace(config).write_shares(Path(sys.argv[1]))
    except USER_ERRORS as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

"""`python -m fedprune.rounds.lay_out FOLDER [--start] < CONFIG.json`: see rounds/setup.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedprune.config import RunConfig
from fedprune.errors import USER_ERRORS
from fedprune.rounds.setup import REFUSED
from fedprune.rounds.workspace import open_workspace


def main() -> None:
    """Lay out; an error that a user can mend is the last line, as JSON."""
    folder, with_start = Path(sys.argv[1]), "--start" in sys.argv[2:]
    try:
        config = RunConfig.parse(json.load(sys.stdin))
        open_workspace(config).lay_out(folder, with_start=with_start)
    except USER_ERRORS as error:
        print(f"\n{json.dumps(str(error))}", flush=True)
        raise SystemExit(REFUSED) from None


if __name__ == "__main__":
    main()

"""`python -m fedprune.rounds.lay_out FOLDER [--start] < CONFIG.json`: see rounds/setup.py."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

from fedprune.config import RunConfig
from fedprune.errors import USER_ERRORS
from fedprune.rounds.setup import REFUSED
from fedprune.rounds.workspace import open_workspace
from prunelab.errors import DataWarning


def main() -> None:
    """Lay out; the last line is JSON: an error that a user can mend, or what to warn of."""
    folder, with_start = Path(sys.argv[1]), "--start" in sys.argv[2:]
    try:
        config = RunConfig.parse(json.load(sys.stdin))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", DataWarning)
            open_workspace(config).lay_out(folder, with_start=with_start)
    except USER_ERRORS as error:
        print(f"\n{json.dumps(str(error))}", flush=True)
        raise SystemExit(REFUSED) from None
    print(f"\n{json.dumps([str(w.message) for w in seen if issubclass(w.category, DataWarning)])}")


if __name__ == "__main__":
    main()

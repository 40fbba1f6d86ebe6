"""`python -m fedprune.local.make_private < TASK.json`: see private.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedprune.local.private import REFUSED
from prunelab.data.own_store import Expected, write_own_store
from prunelab.data.reading import reading
from prunelab.errors import PrunelabError


def main() -> None:
    """Make the store; a refusal is the last line."""
    given = json.load(sys.stdin)
    try:
        write_own_store(
            given["path"],
            Path(given["folder"]),
            how=reading(**given["how"]),
            expected=Expected.of(given["expected"]),
            made_for=given["made_for"],
        )
    except PrunelabError as error:
        print(error, file=sys.stderr)
        raise SystemExit(REFUSED) from None


if __name__ == "__main__":
    main()

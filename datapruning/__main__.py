"""`python -m datapruning`: the `datapruning` command."""

from datapruning.cli import main

if __name__ == "__main__":
    main()

"""`python -m fedprune`: the `fedprune` command."""

from fedprune.cli import main

if __name__ == "__main__":
    main()

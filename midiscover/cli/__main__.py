"""`python -m midiscover.cli` is the `midiscover` command."""

from midiscover.cli import entry

entry()

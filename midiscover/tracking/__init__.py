"""The tracker: a database of sweeps, SAEs, curves and where they came from, for looking things up and comparing.

Not the truth: that is the store, from which `reindex` rebuilds every table. The only package that knows SQLAlchemy;
no module of it loads torch.

    tracker.py     Tracker: open, write, read; what the rest of miDiscover uses
    reindex.py     the store -> the database
    tables.py      the tables · migrations/  the same, by revision
    engine.py      address, connections, migrations to head, retries, errors
    rows.py        JSON documents of the store -> rows · writes.py, queries.py  the SQL
    sweepfiles.py  what lies beside sweep.json: compared pairs, dropped SAEs
    keys.py        keys to the HTTP interface of deployments
    annotations.py a person's note and tags, kept in the store as well
"""

from midiscover.tracking.reindex import Reindexed, reindex
from midiscover.tracking.tracker import Tracker

__all__ = ["Reindexed", "Tracker", "reindex"]

"""Alembic's folder: one file per revision, run by `engine.migrate` when a tracker is opened."""

"""The tracker: every test that takes `address` or `tracker` runs on SQLite and on a real PostgreSQL."""

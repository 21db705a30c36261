-- A role for deployments, which read the tracker and never write it. Run it by the role that owns the tables, once they
-- stand (`midiscover runs list` makes them):
--
--   psql "$OWNER_URL" --set=password="$(openssl rand -hex 24)" --file=cluster/policies/database-reader.sql
CREATE ROLE midiscover_reader LOGIN PASSWORD :'password';
GRANT USAGE ON SCHEMA public TO midiscover_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO midiscover_reader;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO midiscover_reader;

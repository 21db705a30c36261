-- A role for deployments, which read the tracker and never write it. Run it by the role that owns the tables, once they
-- stand (`midiscover runs list` makes them):
--
--   password=$(openssl rand -hex 24)
--   psql "$OWNER_URL" --set=password="$password" --file=cluster/policies/database-reader.sql
--   echo "postgresql://midiscover_reader:$password@HOST:5432/midiscover"     the address for those deployments
CREATE ROLE midiscover_reader LOGIN PASSWORD :'password';
GRANT USAGE ON SCHEMA public TO midiscover_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO midiscover_reader;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO midiscover_reader;

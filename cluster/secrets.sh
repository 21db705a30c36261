#!/bin/sh
# Makes the secrets of cluster/compose.yaml in a folder, once: every password is random, none has a default.
#   secrets.sh FOLDER UID     UID: the user of the image, who alone may read what Ray's containers read
set -eu
folder=$1 user=$2
umask 077
mkdir -p "$folder"
if [ -e "$folder/complete" ]; then
    exit 0
fi

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

postgres=$(random)
access=$(random)
secret=$(random)
printf '%s' "$postgres" > "$folder/postgres"
printf '%s' "$(random)" > "$folder/pgadmin"
printf '%s' "$(random)" > "$folder/ray_token"
printf 'postgres:5432:*:midiscover:%s\n' "$postgres" > "$folder/pgpass"
printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$access" "$secret" > "$folder/aws"
cat > "$folder/s3.json" << END
{"identities": [{
  "name": "midiscover",
  "credentials": [{"accessKey": "$access", "secretKey": "$secret"}],
  "actions": ["Admin", "Read", "List", "Tagging", "Write"]
}]}
END
# Each is read by one user alone: libpq takes no password file that others may read.
chown "$user" "$folder/pgpass" "$folder/aws" "$folder/ray_token"
chmod 0444 "$folder/postgres" "$folder/pgadmin" "$folder/s3.json" # for the servers, each under a number of its own
chmod 0711 "$folder"
touch "$folder/complete"

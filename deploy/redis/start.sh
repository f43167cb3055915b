#!/bin/sh
# Starts the server with one user: `dit`, who may do in the service's own keys what the service does. Wants REDIS_PASSWORD; while it
# is being replaced, REDIS_OLD_PASSWORD is valid too. The data lie in DATA_DIR (/data), the users in RUN_DIR (/tmp). Further arguments
# go to the server.
set -eu
umask 077
run=${RUN_DIR:-/tmp}
passwords=
for password in "$REDIS_PASSWORD" "${REDIS_OLD_PASSWORD:-}"; do
    [ -z "$password" ] || passwords="$passwords #$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)"
done
[ -n "$passwords" ] || { echo "error: REDIS_PASSWORD is empty" >&2; exit 2; }
# The default user cannot log in, but may do all: as it the server reads its own append-only file, transactions included.
cat >"$run/users.acl" <<ACL
user default off resetpass allkeys allchannels +@all
user dit on$passwords resetkeys ~{dit}:* ~{dit-*}:* resetchannels &{dit}:* &{dit-*}:* -@all +@connection +@hash +@pubsub +@scripting +@set +@sortedset +@stream +@string +@transaction +del +exists +pexpire +persist +scan +time -@dangerous +info
ACL
exec valkey-server "$(dirname "$0")/redis.conf" --dir "${DATA_DIR:-/data}" --aclfile "$run/users.acl" "$@"

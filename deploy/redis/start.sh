#!/bin/sh
# Starts the server with one user: `dit`, who may do in the service's own keys what the service does. Wants REDIS_PASSWORD.
# The data lie in DATA_DIR (/data), the users in RUN_DIR (/tmp). Further arguments go to the server.
set -eu
umask 077
run=${RUN_DIR:-/tmp}
digest=$(printf %s "$REDIS_PASSWORD" | sha256sum | cut -d ' ' -f 1)
cat >"$run/users.acl" <<ACL
user default off
user dit on #$digest resetkeys ~{dit}:* ~{dit-*}:* resetchannels &{dit}:* &{dit-*}:* -@all +@connection +@hash +@pubsub +@scripting +@sortedset +@stream +@string +@transaction +del +exists +pexpire +persist +scan +time -@dangerous +info
ACL
exec valkey-server "$(dirname "$0")/redis.conf" --dir "${DATA_DIR:-/data}" --aclfile "$run/users.acl" "$@"

-- End a held job with an error; or, if `retry` is 1, count the attempt and queue the job again while it has
-- attempts left. Returns 1 if applied (also when repeated), 0 if the lease was lost.
local id, owner, attempt, fault, retry = unpack(ARGS, 1, 5)
local attempts, dead_ttl, dead_kept = tonumber(ARGS[6]), tonumber(ARGS[7]), tonumber(ARGS[8])
if not holds(id, owner, attempt) then
  local job = redis.call('HMGET', job_key(id), 'state', 'owner', 'attempt')
  return (job[1] == 'failed' and job[2] == owner and job[3] == attempt) and 1 or 0
end
redis.call('ZREM', LEASES, id)
if retry == '1' then
  consume_attempt(id, attempts, dead_ttl, dead_kept, fault)
else
  conclude(id, 'failed', 'failed', fault)
end
return 1

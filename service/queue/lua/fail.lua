-- End a held job with an error; or, if `retry` is 1, count the attempt and queue the job again while it has
-- attempts left. Returns 1 if applied (also when repeated), 0 if the lease was lost.
local id, owner, attempt, fault, retry = unpack(ARGS, 1, 5)
local attempts, dead_ttl, dead_kept = tonumber(ARGS[6]), tonumber(ARGS[7]), tonumber(ARGS[8])
local job = intact(id)
if not holds(job, owner, attempt) then return ended_by(job, 'failed', owner, attempt) and 1 or 0 end
if retry == '1' then
  consume_attempt(job, attempts, dead_ttl, dead_kept, fault)
else
  redis.call('ZREM', LEASES, id)
  conclude(job, 'failed', 'failed', fault)
end
return 1

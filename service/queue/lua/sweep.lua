-- Take jobs back from workers whose lease has ended; each such loss counts as an attempt. Then, at most once in
-- `RECONCILE_EVERY` ms however many workers sweep, look for jobs whose records or indexes were lost. Returns how
-- many leases ended; -1, and nothing is done, if this server's clock is not what the worker knows it to be: it
-- was set, so that leases may seem to have ended that are kept.
-- ARGS: attempts allowed, dead TTL (ms), dead kept, error, now as the worker knows it (ms), tolerance (ms).
local RECONCILE_EVERY = 1000
local attempts, dead_ttl, dead_kept, fault = tonumber(ARGS[1]), tonumber(ARGS[2]), tonumber(ARGS[3]), ARGS[4]
if math.abs(NOW - tonumber(ARGS[5])) > tonumber(ARGS[6]) then return -1 end
local ended = redis.call('ZRANGEBYSCORE', LEASES, '-inf', NOW, 'LIMIT', 0, 256)
for _, id in ipairs(ended) do
  local job = intact(id)
  if job and job.state == 'running' then
    consume_attempt(job, attempts, dead_ttl, dead_kept, fault)
  else
    redis.call('ZREM', LEASES, id)
  end
end
if math.abs(NOW - (tonumber(redis.call('HGET', TOTALS, 'reconciled')) or 0)) >= RECONCILE_EVERY then
  reconcile()
  -- A write that memory pressure cannot refuse comes before one that it can.
  redis.call('ZREM', LEASES, '')
  redis.call('HSET', TOTALS, 'reconciled', NOW)
end
return #ended

-- Take jobs back from workers whose lease has ended; each such loss counts as an attempt. Returns how many
-- leases ended.
-- ARGS: attempts allowed, dead TTL (ms), dead kept, error.
local attempts, dead_ttl, dead_kept, fault = tonumber(ARGS[1]), tonumber(ARGS[2]), tonumber(ARGS[3]), ARGS[4]
local ended = redis.call('ZRANGEBYSCORE', LEASES, '-inf', NOW, 'LIMIT', 0, 256)
for _, id in ipairs(ended) do
  redis.call('ZREM', LEASES, id)
  consume_attempt(id, attempts, dead_ttl, dead_kept, fault)
end
return #ended

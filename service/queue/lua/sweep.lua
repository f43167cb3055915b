-- Take jobs from workers whose lease ended. Each counts an attempt.
-- ARGS: attempts allowed, dead TTL, dead kept, error. Returns how many leases ended.
local attempts, dead_ttl, dead_kept, fault = tonumber(ARGS[1]), tonumber(ARGS[2]), tonumber(ARGS[3]), ARGS[4]
local ended = redis.call('ZRANGEBYSCORE', LEASES, '-inf', NOW, 'LIMIT', 0, 256)
for _, id in ipairs(ended) do
  redis.call('ZREM', LEASES, id)
  spend(id, attempts, dead_ttl, dead_kept, fault)
end
return #ended

-- Store a worker's report until it goes stale. An empty report withdraws the last one.
local worker, report, ttl = ARGS[1], ARGS[2], tonumber(ARGS[3])
for _, stale in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, '-inf', NOW)) do
  redis.call('HDEL', REPORTS, stale)
end
redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', NOW)
if report == '' then
  redis.call('ZREM', WORKERS, worker)
  redis.call('HDEL', REPORTS, worker)
  redis.call('DEL', PREFIX .. 'given:' .. worker)
else
  redis.call('ZADD', WORKERS, NOW + ttl, worker)
  redis.call('HSET', REPORTS, worker, report)
  redis.call('PEXPIRE', PREFIX .. 'given:' .. worker, ttl)
end
return 1

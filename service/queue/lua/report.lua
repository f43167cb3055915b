-- Keep a worker's report until it goes stale, or (empty report) forget the worker.
local worker, report, ttl = ARGS[1], ARGS[2], tonumber(ARGS[3])
for _, stale in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, '-inf', NOW)) do redis.call('HDEL', REPORTS, stale) end
redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', NOW)
if report == '' then
  redis.call('ZREM', WORKERS, worker)
  redis.call('HDEL', REPORTS, worker)
else
  redis.call('ZADD', WORKERS, NOW + ttl, worker)
  redis.call('HSET', REPORTS, worker, report)
end
return 1

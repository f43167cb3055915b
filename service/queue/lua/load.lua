-- Read the load, for admission. Returns {jobs waiting, rows waiting, when the oldest was queued (ms; 0:
-- none), now (ms), jobs ever dead-lettered, jobs ever lost, deadlines ever kept and broken, {worker, report,
-- rows ever given to it}...}.
-- Changes nothing, and fails where Redis takes no writes: then there is no load to be admitted to.
redis.call('ZREM', LEASES, '')
local oldest = redis.call('ZRANGE', AGES, 0, 0, 'WITHSCORES')[2] or 0
local totals = redis.call('HMGET', TOTALS, 'rows', 'dead', 'orphans', 'kept', 'broken')
for i = 1, 5 do totals[i] = whole(totals[i]) or 0 end
local answer = { redis.call('ZCARD', QUEUE), math.max(0, totals[1]), tonumber(oldest), NOW, unpack(totals, 2) }
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, '(' .. NOW, '+inf')) do
  local given = whole(redis.pcall('GET', PREFIX .. 'given:' .. worker)) or 0
  answer[#answer + 1] = { worker, redis.call('HGET', REPORTS, worker), given }
end
return answer

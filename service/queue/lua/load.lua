-- Read the load, for admission. Returns {jobs waiting, rows waiting, when the oldest was queued (ms; 0:
-- none), now (ms), jobs ever dead-lettered, {worker, report, rows ever given to it}...}.
local oldest = redis.call('ZRANGE', AGES, 0, 0, 'WITHSCORES')[2] or 0
local totals = redis.call('HMGET', TOTALS, 'rows', 'dead')
local rows, dead = tonumber(totals[1] or 0), tonumber(totals[2] or 0)
local answer = { redis.call('ZCARD', QUEUE), rows, tonumber(oldest), NOW, dead }
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, '(' .. NOW, '+inf')) do
  local given = tonumber(redis.call('GET', PREFIX .. 'given:' .. worker) or 0)
  answer[#answer + 1] = { worker, redis.call('HGET', REPORTS, worker), given }
end
return answer

-- What admission looks at. Returns {jobs waiting, rows waiting, when the oldest was queued (ms, 0 = none), now (ms),
-- jobs ever put aside as dead, {report, rows ever given to its worker}...}.
local oldest = redis.call('ZRANGE', AGES, 0, 0, 'WITHSCORES')[2] or 0
local totals = redis.call('HMGET', TOTALS, 'rows', 'dead')
local answer = { redis.call('ZCARD', QUEUE), tonumber(totals[1] or 0), tonumber(oldest), NOW, tonumber(totals[2] or 0) }
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, '(' .. NOW, '+inf')) do
  answer[#answer + 1] = { redis.call('HGET', REPORTS, worker), tonumber(redis.call('GET', PREFIX .. 'given:' .. worker) or 0) }
end
return answer

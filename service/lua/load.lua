-- What admission looks at. Returns {jobs waiting, rows waiting, when the oldest was queued (ms, 0 = none), now (ms), report...}.
local oldest = redis.call('ZRANGE', AGES, 0, 0, 'WITHSCORES')[2] or 0
local rows = redis.call('HGET', TOTALS, 'rows') or 0
local answer = { redis.call('ZCARD', QUEUE), tonumber(rows), tonumber(oldest), NOW }
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, '(' .. NOW, '+inf')) do
  answer[#answer + 1] = redis.call('HGET', REPORTS, worker)
end
return answer

-- Store a held job's result, then end the job. When the byte budget is exceeded the oldest results go; their
-- jobs stay done. Returns 1 if this attempt's result is the one stored (also when repeated), 0 if the lease
-- was lost.
local id, owner, attempt, result, summary, steps = unpack(ARGS, 1, 6)
local ttl, budget = tonumber(ARGS[7]), tonumber(ARGS[8])
local job = intact(id)
if not holds(job, owner, attempt) then return ended_by(job, 'done', owner, attempt) and 1 or 0 end

-- First of all a write that memory pressure cannot refuse. After it Redis lets all other writes of the script
-- pass, so that accepted work still ends when memory is full.
redis.call('ZREM', LEASES, id)

local function stored_bytes() return whole(redis.call('HGET', TOTALS, 'bytes')) or 0 end

local function remove_result(old)
  redis.call('ZREM', RESULTS, old)
  add(TOTALS, 'bytes', -(whole(redis.call('HGET', SIZES, old)) or 0))
  redis.call('HDEL', SIZES, old)
  redis.call('DEL', PREFIX .. 'result:' .. old)
end
for _, old in ipairs(redis.call('ZRANGEBYSCORE', RESULTS, '-inf', NOW, 'LIMIT', 0, 64)) do
  remove_result(old)
end
-- A try that ended halfway may have stored it.
remove_result(id)
while stored_bytes() + #result > budget do
  local oldest = redis.call('ZRANGE', RESULTS, 0, 0)[1]
  if not oldest then break end
  remove_result(oldest)
end

redis.call('SET', PREFIX .. 'result:' .. id, result, 'PX', ttl)
redis.call('ZADD', RESULTS, NOW + ttl, id)
redis.call('HSET', SIZES, id, #result)
add(TOTALS, 'bytes', #result)
redis.call('HSET', job_key(id), 'step', steps, 'steps', steps)
conclude(job, 'done', 'done', summary)
return 1

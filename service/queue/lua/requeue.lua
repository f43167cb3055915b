-- Queue a dead job again with all its attempts; it stays a poison candidate. Returns 1 if it was dead, else
-- 0.
local id, data = unpack(ARGS)
local job = job_key(id)
if redis.call('HGET', job, 'state') ~= 'dead' then return 0 end
redis.call('ZREM', DEAD, id)
redis.call('DEL', PREFIX .. 'events:' .. id)
redis.call('PERSIST', job)
redis.call('HDEL', job, 'error')
redis.call('HSET', job, 'spent', 0, 'step', 0)
count_unfinished(redis.call('HGET', job, 'caller'), 1)
put_back(id)
emit(id, 'queued', data)
return 1

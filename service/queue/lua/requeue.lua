-- Queue a dead job again with all its attempts; it stays a poison candidate. Returns 1 if it was dead, else
-- 0.
local id, data = unpack(ARGS)
local job, key = intact(id), job_key(id)
if not job or job.state ~= 'dead' then return 0 end
redis.call('ZREM', DEAD, id)
redis.call('DEL', PREFIX .. 'events:' .. id)
redis.call('PERSIST', key)
redis.call('HDEL', key, 'error', 'withdrawn')
if job.callback then
  redis.call('ZREM', CALLBACKS, id)
  redis.call('HSET', key, 'callback', 'waiting')
end
redis.call('HSET', key, 'spent', 0, 'step', 0)
count_unfinished(job.caller, 1)
put_back(job)
emit(id, 'queued', data)
return 1

-- End a waiting or running job; the worker that runs it is notified. Returns 1 if this ended it, 0 if it had
-- ended or is unknown.
local id, data = unpack(ARGS)
local job = redis.call('HMGET', job_key(id), 'state', 'rows')
if job[1] == 'queued' then
  dequeue(id, tonumber(job[2]))
elseif job[1] == 'running' then
  redis.call('ZREM', LEASES, id)
  redis.call('PUBLISH', PREFIX .. 'cancelled', id)
else
  return 0
end
conclude(id, 'cancelled', 'cancelled', data)
return 1

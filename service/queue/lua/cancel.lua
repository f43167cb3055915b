-- End a job that has not ended, waiting or running; a worker that runs it is told. Returns 1 if it was ended by this, else 0.
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

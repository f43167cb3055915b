-- End a waiting or running job; the worker that runs it is notified. Returns 1 if this ended it, 0 if it had
-- ended or is unknown.
local id, data = unpack(ARGS)
local job = intact(id)
if job and job.state == 'queued' then
  dequeue(job)
elseif job and job.state == 'running' then
  redis.call('ZREM', LEASES, id)
  redis.call('PUBLISH', PREFIX .. 'cancelled', id)
else
  return 0
end
conclude(job, 'cancelled', 'cancelled', data)
return 1

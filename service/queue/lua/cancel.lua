-- End a waiting or running job; the worker that runs it is notified. While further requests hold the job (see
-- join.lua) it runs on for them, and is cancelled for its own request alone: withdrawn. With a `holder` one of
-- those leaves; the last one ends a withdrawn job. Returns 1 if the job was there to be left, 0 if it had ended
-- or is unknown.
local id, data, holder = unpack(ARGS)
local job = intact(id)
if not job or (job.state ~= 'queued' and job.state ~= 'running') then return 0 end

local holders = holders_key(id)
keep_kind(holders, 'SCARD')
redis.call('SREM', holders, holder)
local held = redis.call('SCARD', holders) > 0
if holder ~= '' and (held or not job.withdrawn) then return 1 end
if held then
  if job.withdrawn then return 0 end
  redis.call('HSET', job_key(id), 'withdrawn', 1, 'error', data)
  call_back(job)
  emit(id, 'cancelled', data)
  return 1
end

if job.state == 'queued' then
  dequeue(job)
else
  redis.call('ZREM', LEASES, id)
  redis.call('PUBLISH', PREFIX .. 'cancelled', id)
end
conclude(job, 'cancelled', 'cancelled', data)
return 1

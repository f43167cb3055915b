-- Return a held job to the head of the queue, for a worker that leaves. The attempt is not counted. The
-- checkpoint holds what is done of the job; without one (empty) it starts anew. Returns 1 if applied, 0 if
-- the lease was lost.
local id, owner, attempt, data, checkpoint, step, ttl = unpack(ARGS)
local job = intact(id)
if not holds(job, owner, attempt) then return 0 end
put_back(job)
if checkpoint == '' then
  redis.call('DEL', checkpoint_key(id))
else
  redis.call('SET', checkpoint_key(id), checkpoint, 'PX', ttl)
end
redis.call('HSET', job_key(id), 'step', step)
emit(id, 'queued', data)
return 1

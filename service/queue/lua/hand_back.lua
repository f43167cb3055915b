-- A worker that leaves gives a held job back: to the head of the queue, without counting the attempt, and with what it has done so
-- far (the checkpoint; empty: the job starts anew). Returns 1 if applied, 0 if the lease was lost.
local id, owner, attempt, data, checkpoint, step, ttl = unpack(ARGS)
if not holds(id, owner, attempt) then return 0 end
put_back(id)
if checkpoint == '' then
  redis.call('DEL', checkpoint_key(id))
else
  redis.call('SET', checkpoint_key(id), checkpoint, 'PX', ttl)
end
redis.call('HSET', job_key(id), 'step', step)
emit(id, 'queued', data)
return 1

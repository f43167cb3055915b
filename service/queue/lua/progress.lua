-- Append an event of a held job; a step also updates its record. Returns 1 if the lease still holds, else 0.
local id, owner, attempt, kind, data, step, steps = unpack(ARGS)
if not holds(intact(id), owner, attempt) then return 0 end
if step ~= '' then redis.call('HSET', job_key(id), 'step', step) end
if steps ~= '' then redis.call('HSET', job_key(id), 'steps', steps) end
emit(id, kind, data)
return 1

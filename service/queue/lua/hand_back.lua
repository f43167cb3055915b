-- A worker that leaves gives a held job back: to the head of the queue, without counting the attempt.
-- Returns 1 if applied, 0 if the lease was lost.
local id, owner, attempt, data = unpack(ARGS)
if not holds(id, owner, attempt) then return 0 end
put_back(id)
emit(id, 'queued', data)
return 1

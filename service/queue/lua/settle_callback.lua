-- Note how a callback went that was leased: it is 'delivered', 'given-up', or 'pending' again after a delay.
-- Returns 1 if applied, 0 if the lease was lost: another process has been given it since, or it is settled.
-- ARGS: job, number, when the job ended (ms), state, delay (ms), the fault.
local id, number, ended_at, state, delay, fault = unpack(ARGS)
local job = read_record(id)
local now = job and redis.call('HMGET', job_key(id), 'called', 'ended_at')
if not (job and job.callback == 'pending' and now[1] == number and now[2] == ended_at) then return 0 end
redis.call('ZREM', CALLBACKS, id)
redis.call('HSET', job_key(id), 'callback', state, 'callback_fault', fault)
if state == 'pending' then redis.call('ZADD', CALLBACKS, NOW + delay, id) end
return 1

-- Lease the callbacks that are due, at most so many. Whoever is given one settles it (settle_callback.lua) before
-- its lease ends; else another process is given it. Returns per callback {job, its number among the job's, when
-- the job ended (ms)}, or {job, 0, 0} for one whose record is gone: nobody can be called any more.
-- ARGS: lease (ms), how many.
local lease, most = tonumber(ARGS[1]), tonumber(ARGS[2])
local due = {}
-- A write that memory pressure cannot refuse comes before those that it can.
redis.call('ZREM', CALLBACKS, '')
for _, id in ipairs(redis.call('ZRANGEBYSCORE', CALLBACKS, '-inf', NOW, 'LIMIT', 0, most)) do
  local job = read_record(id)
  if job and job.callback == 'pending' then
    redis.call('ZADD', CALLBACKS, NOW + lease, id)
    local ended_at = whole(redis.call('HGET', job_key(id), 'ended_at')) or NOW
    due[#due + 1] = { id, add(job_key(id), 'called', 1), ended_at }
  else
    redis.call('ZREM', CALLBACKS, id)
    if not job then due[#due + 1] = { id, 0, 0 } end
  end
end
return due

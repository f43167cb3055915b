-- Extend leases that are still held, unless the job has run longer than the cap. A lease that was lost stays
-- lost.
-- ARGS: lease (ms), cap (ms), then id, owner and attempt of each lease. Returns per lease: 0 held, 1 lost, 2
-- cancelled.
local lease, cap = tonumber(ARGS[1]), tonumber(ARGS[2])
local verdicts = {}
for i = 3, #ARGS, 3 do
  local id = ARGS[i]
  local job = redis.call('HMGET', job_key(id), 'state', 'owner', 'attempt', 'claimed_at')
  local mine = job[2] == ARGS[i + 1] and job[3] == ARGS[i + 2]
  local verdict = 1
  if mine and job[1] == 'running' and NOW - tonumber(job[4]) <= cap then
    redis.call('ZADD', LEASES, 'XX', NOW + lease, id)
    verdict = 0
  elseif mine and job[1] == 'cancelled' then
    verdict = 2
  end
  verdicts[#verdicts + 1] = verdict
end
return verdicts

-- Extend leases that are still held, unless the job has run longer than the cap. A lease that was lost stays
-- lost.
-- ARGS: cap (ms), then id, owner and attempt of each lease. Returns per lease: 0 held, 1 lost, 2
-- cancelled.
local cap = tonumber(ARGS[1])
local verdicts = {}
for i = 2, #ARGS, 3 do
  local id = ARGS[i]
  local job, owner, attempt = intact(id), ARGS[i + 1], ARGS[i + 2]
  local verdict = 1
  if holds(job, owner, attempt) and NOW - job.claimed_at <= cap then
    redis.call('ZADD', LEASES, NOW + LEASE, id)
    verdict = 0
  elseif ended_by(job, 'cancelled', owner, attempt) then
    verdict = 2
  end
  verdicts[#verdicts + 1] = verdict
end
return verdicts

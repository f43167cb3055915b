-- Lease the next jobs of the given models, in fair order, as far as they fit the caller's room (samples).
-- A job larger than the room stops the claim, so that small ones cannot starve it; an idle caller takes it all the same.
-- A suspect (its worker crashed) goes to an idle caller, alone; one that has waited too long holds back the others.
-- A job past its deadline fails here. Repeating a claim with the same nonce gives the same jobs, as far as they are still held.
-- Returns the rows the owner was ever given, which its reports repeat, and {id, wire, attempt, suspect, checkpoint} per job; the
-- checkpoint is empty unless a worker left one.
local owner, nonce, started, expired = unpack(ARGS, 1, 4)
local room, idle, lease, patience = tonumber(ARGS[5]), ARGS[6] == '1', tonumber(ARGS[7]), tonumber(ARGS[8])
local models = {}
for i = 9, #ARGS do models[ARGS[i]] = true end
local memory, given = PREFIX .. 'claim:' .. owner, PREFIX .. 'given:' .. owner

local function handed(id, attempt)
  local job = redis.call('HMGET', job_key(id), 'wire', 'suspect')
  return { id, job[1], attempt, job[2] and 1 or 0, redis.call('GET', checkpoint_key(id)) or '' }
end

local function repeated()
  local taken = { tonumber(redis.call('GET', given) or 0) }
  for _, id in ipairs(redis.call('HKEYS', memory)) do
    local attempt = redis.call('HGET', memory, id)
    if id ~= '' and holds(id, owner, attempt) then taken[#taken + 1] = handed(id, tonumber(attempt)) end
  end
  return taken
end
if redis.call('HGET', memory, '') == nonce then return repeated() end
redis.call('DEL', memory)

local taken, clock, given_rows = {}, 0, 0

local function take(id, score, rows)
  dequeue(id, rows)
  local job = job_key(id)
  local attempt = redis.call('HINCRBY', job, 'attempt', 1)
  redis.call('HSET', job, 'state', 'running', 'owner', owner, 'claimed_at', NOW)
  redis.call('ZADD', LEASES, NOW + lease, id)
  emit(id, 'started', started)
  redis.call('HSET', memory, id, attempt)
  taken[#taken + 1] = handed(id, attempt)
  clock, given_rows = math.max(clock, score), given_rows + rows
end

-- Returns 'gone' (left the queue), 'pass' (stays, look further) or 'stop'.
local function consider(id, score)
  local job = redis.call('HMGET', job_key(id), 'model', 'samples', 'rows', 'deadline', 'suspect', 'returned_at')
  local samples, rows = tonumber(job[2]), tonumber(job[3])
  if job[4] ~= '' and tonumber(job[4]) < NOW then
    dequeue(id, rows)
    conclude(id, 'failed', 'failed', expired)
    return 'gone'
  end
  if not models[job[1]] then return 'pass' end
  if job[5] and not (idle and #taken == 0) then
    return NOW - tonumber(job[6]) > patience and 'stop' or 'pass'
  end
  if samples > room and not (idle and #taken == 0) then return 'stop' end
  take(id, score, rows)
  room = room - samples
  return (job[5] or room <= 0) and 'stop' or 'gone'
end

local function walk()
  local passed = 0
  while true do
    local page = redis.call('ZRANGE', QUEUE, passed, passed + 31, 'WITHSCORES')
    if #page == 0 then return end
    for i = 1, #page, 2 do
      local verdict = consider(page[i], tonumber(page[i + 1]))
      if verdict == 'stop' then return end
      if verdict == 'pass' then passed = passed + 1 end
    end
  end
end
if room > 0 then walk() end

if #taken > 0 then
  redis.call('HSET', memory, '', nonce)
  redis.call('PEXPIRE', memory, lease)
  if redis.call('EXISTS', QUEUE) == 1 then
    clock = math.max(clock, tonumber(redis.call('HGET', TOTALS, 'clock')) or 0)
    redis.call('HSET', TOTALS, 'clock', string.format('%.17g', clock))
    redis.call('ZREMRANGEBYSCORE', FLOWS, '-inf', clock)
  end
  redis.call('INCRBY', given, given_rows)
  redis.call('PEXPIRE', given, lease)
end
table.insert(taken, 1, tonumber(redis.call('GET', given) or 0))
return taken

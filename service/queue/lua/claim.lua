-- Lease the next jobs of the given models in fair order (see submit.lua), as far as they fit into the
-- worker's room (samples). Returns the rows ever given to the owner, which its reports repeat, and {id, wire,
-- attempt, suspect, checkpoint, schema version} per job. The checkpoint is empty unless a worker left one.
-- Repeating a claim with the same nonce returns the same jobs, as far as still held. So a claim that is cut
-- short by an index of another kind, and repeated once that is repaired, loses none of those that it took.
--
-- Rules, from the head of the queue on:
--   past its deadline       the job fails here
--   of another model        look further
--   of another version      look further: a worker of the release that wrote it will take it
--   a poison candidate      (its worker crashed) only an idle worker takes it, as the only job; others look
--                           further, but stop at one that has waited too long, so that they become idle
--   larger than the room    it ends the room, so that small jobs cannot starve it; an idle worker takes it all
--                           the same
--   no room                 a job of a flow that is not crowded, and was given none in this claim, may have of
--                           the reserved samples; only the first jobs are looked at, a newcomer's among them,
--                           and none where all that waits is of crowded flows
-- The Python model in tests/service/queue/test_broker_model.py says the same in other words.
local owner, nonce, started, expired = unpack(ARGS, 1, 4)
local room, idle, patience = tonumber(ARGS[5]), ARGS[6] == '1', tonumber(ARGS[7])
local oldest, newest = tonumber(ARGS[8]), tonumber(ARGS[9])
local reserved, last_model = tonumber(ARGS[10]), 11 + tonumber(ARGS[11])
local models, crowded = {}, {}
for i = 12, last_model do models[ARGS[i]] = true end
for i = last_model + 1, #ARGS do crowded[ARGS[i]] = true end
local LOOK_FOR_NEWCOMERS = 128
-- The last claim: a hash of job → attempt, and under the empty name the nonce.
local last_claim, given_key = PREFIX .. 'claim:' .. owner, PREFIX .. 'given:' .. owner

-- The schema version of a message, whose map (of fewer than 16 entries, or of more) begins with it. A message
-- that begins with anything else counts as readable: the worker will say what is wrong with it.
local function version_of(wire)
  local version = string.match(wire, '^[\128-\143]\161v(.)') or string.match(wire, '^\222..\161v(.)')
  return version and string.byte(version) or newest
end

local function entry(job, attempt)
  local checkpoint = redis.pcall('GET', checkpoint_key(job.id))
  if type(checkpoint) ~= 'string' then checkpoint = '' end
  return { job.id, job.wire, attempt, job.suspect and 1 or 0, checkpoint, version_of(job.wire) }
end

local function given_so_far() return whole(redis.pcall('GET', given_key)) or 0 end

local function same_answer()
  local answer = { given_so_far() }
  for _, id in ipairs(redis.call('HKEYS', last_claim)) do
    local attempt = redis.call('HGET', last_claim, id)
    local job = id ~= '' and intact(id)
    if holds(job, owner, attempt) then answer[#answer + 1] = entry(job, tonumber(attempt)) end
  end
  return answer
end
keep_kind(last_claim, 'HLEN')
if redis.call('HGET', last_claim, '') == nonce then return same_answer() end
redis.call('DEL', last_claim)

local taken, clock, rows_taken = {}, 0, 0

-- An index of another kind may end the script at each of these writes. The job is then in one index still, where
-- it is found, and the claim remembers it already.
local function take(job, finish)
  local id, attempt = job.id, job.attempt + 1
  redis.call('HSET', last_claim, '', nonce, id, attempt)
  redis.call('PEXPIRE', last_claim, LEASE)
  redis.call('HSET', job_key(id), 'state', 'running', 'attempt', attempt, 'owner', owner, 'claimed_at', NOW)
  redis.call('ZADD', LEASES, NOW + LEASE, id)
  dequeue(job)
  emit(id, 'started', started)
  taken[#taken + 1] = entry(job, attempt)
  clock, rows_taken = math.max(clock, finish), rows_taken + job.rows
end

-- Returns true for a job that a full worker passes for its flow alone. Its whole record need not be read: a look
-- for newcomers passes up to 128 of these.
local function passed_over(id)
  local seen = redis.pcall('HMGET', job_key(id), 'flow', 'deadline', 'suspect')
  return crowded[seen[1]] and (tonumber(seen[2]) or math.huge) >= NOW and not seen[3]
end

-- Returns 'left' (the job is in the queue no longer), 'stays' (look further) or 'stop' (end the claim).
local function consider(id, finish)
  local takes_anything = idle and #taken == 0
  if room <= 0 and not takes_anything and passed_over(id) then return 'stays' end
  local job = intact(id)
  if not job then return 'left' end
  local version = version_of(job.wire)
  if (tonumber(job.deadline) or math.huge) < NOW then
    dequeue(job)
    conclude(job, 'failed', 'failed', expired)
    return 'left'
  end
  if not models[job.model] or version < oldest or version > newest then return 'stays' end
  if job.suspect and not takes_anything then
    return NOW - job.returned_at > patience and 'stop' or 'stays'
  end
  if job.samples <= room or takes_anything then
    room = room - job.samples
  elseif job.samples <= reserved and not crowded[job.flow] then
    reserved = reserved - job.samples
  else
    room = 0
    return 'stays'
  end
  crowded[job.flow] = true
  take(job, finish)
  return job.suspect and 'stop' or 'left'
end

-- Returns whether the reserved samples may be for a job that waits. The flows of those that wait are read from DUES,
-- one after the other until one is not crowded: to read the records of 128 jobs takes a hundred times as long. A job
-- that was put back is in DUES no longer; it is at the head of the queue.
local function newcomer_waits()
  local head = redis.call('ZRANGE', QUEUE, 0, 0, 'WITHSCORES')[2]
  local member = redis.call('ZRANGE', DUES, 0, 0)[1]
  if (idle and #taken == 0) or tonumber(head) == 0 or not member then return true end
  while member do
    local flow = string.match(member, '^(.*)%z')
    if not crowded[flow] then return true end
    member = redis.call('ZRANGEBYLEX', DUES, '[' .. flow .. '\1', '+', 'LIMIT', 0, 1)[1]
  end
  return false
end

local function walk()
  local passed = 0
  while room > 0 or (reserved > 0 and passed < LOOK_FOR_NEWCOMERS and newcomer_waits()) do
    local page = redis.call('ZRANGE', QUEUE, passed, passed + 31, 'WITHSCORES')
    if #page == 0 then return end
    for i = 1, #page, 2 do
      local verdict = consider(page[i], tonumber(page[i + 1]))
      if verdict == 'stop' or (room <= 0 and reserved <= 0) then return end
      if verdict == 'stays' then passed = passed + 1 end
    end
  end
end
walk()

if #taken > 0 then
  if redis.call('EXISTS', QUEUE) == 1 then
    clock = math.max(clock, finite(redis.call('HGET', TOTALS, 'clock')))
    redis.call('HSET', TOTALS, 'clock', string.format('%.17g', clock))
    redis.call('ZREMRANGEBYSCORE', FLOWS, '-inf', clock)
  end
  redis.call('SET', given_key, string.format('%.0f', given_so_far() + rows_taken), 'PX', LEASE)
end
table.insert(taken, 1, given_so_far())
return taken

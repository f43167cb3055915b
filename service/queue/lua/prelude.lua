-- Prepended to every script: the keys, the clock, and the moves that a job can make. Running it changes
-- nothing.
-- KEYS: `Keys.permanent`, in order. ARGV: prefix, now (ms; empty: this server's clock), record TTL (ms), lease
-- (ms), events kept per job, the error of a job that was lost, and then the script's own arguments (ARGS).
--
-- Redis does not roll a failed script back. So a script reads a job's record first (`intact`), writes only if
-- that is whole, and never makes a record but in submit.lua. A record that is gone or lacks a field (Redis
-- evicted it, somebody deleted it) takes its entries in the indexes with it. A count that is no number is 0 until
-- `reconcile` counts anew. An index of another kind ends a script; repair.lua then removes it.
local QUEUE, AGES, LEASES, FLOWS, DUES, TOTALS = unpack(KEYS, 1, 6)
local DEAD, RESULTS, SIZES, WORKERS, REPORTS, UNFINISHED, CALLBACKS = unpack(KEYS, 7, 13)
local PREFIX, RECORD_TTL, LEASE = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
local EVENTS_KEPT, LOST = ARGV[5], ARGV[6]
local ARGS = { unpack(ARGV, 7) }

local function read_clock()
  if ARGV[2] ~= '' then return tonumber(ARGV[2]) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local NOW = read_clock()

-- Returns the number in a text that holds a whole one, which Lua can count exactly; else nil.
local function whole(text)
  return type(text) == 'string' and #text < 16 and string.match(text, '^%-?%d+$') and tonumber(text) or nil
end

-- Returns the number in a text that holds a finite one; else 0.
local function finite(text)
  local number = tonumber(text or 0)
  return number and math.abs(number) < math.huge and number or 0
end

-- Add to a whole number of a hash; returns the sum. HINCRBY would end the script at anything but such a number.
local function add(key, field, change)
  local sum = (whole(redis.call('HGET', key, field)) or 0) + change
  redis.call('HSET', key, field, string.format('%.0f', sum))
  return sum
end

-- Remove a key of another kind than it should be, which the command `size` would count. It would end a script
-- between two writes. Returns how many were removed.
local function keep_kind(key, size)
  if type(redis.pcall(size, key)) == 'number' then return 0 end
  return redis.call('DEL', key)
end

local function job_key(id) return PREFIX .. 'job:' .. id end
local function checkpoint_key(id) return PREFIX .. 'checkpoint:' .. id end
local function holders_key(id) return PREFIX .. 'holders:' .. id end

-- Members of DUES sort by flow, and within a flow by when a job is due (ms).
local function due_key(flow, due) return flow .. '\0' .. string.format('%015.0f', due) end

-- Append an event to the job's stream.
local function emit(id, kind, data)
  local stream = PREFIX .. 'events:' .. id
  keep_kind(stream, 'XLEN')
  redis.call('XADD', stream, 'MAXLEN', '~', EVENTS_KEPT, '*', 'kind', kind, 'data', data)
  redis.call('PEXPIRE', stream, RECORD_TTL)
end

-- The fields that submit.lua writes, of every release that may share this queue: texts, then whole numbers; and
-- those of later moves.
local FIELDS = {
  'wire', 'nonce', 'state', 'model', 'flow', 'caller', 'deadline',
  'samples', 'rows', 'due', 'attempt', 'spent', 'step',
  'owner', 'claimed_at', 'suspect', 'returned_at', 'withdrawn', 'callback',
}
local LAST_TEXT, LAST_NUMBER = 7, 13

-- Returns a job's record by field, or nil if it is not whole. A field that is not set is false.
local function read_record(id)
  local values = redis.pcall('HMGET', job_key(id), unpack(FIELDS))
  if values.err then return nil end
  local job = { id = id }
  for i, field in ipairs(FIELDS) do
    local value = values[i]
    if i > LAST_TEXT and i <= LAST_NUMBER then value = whole(value) end
    if i <= LAST_NUMBER and not value then return nil end
    job[field] = value
  end
  job.claimed_at, job.returned_at = whole(job.claimed_at), whole(job.returned_at)
  if job.state == 'running' and not (job.owner and job.claimed_at) then return nil end
  if job.state == 'queued' and job.suspect and not job.returned_at then return nil end
  return job
end

-- Remove a job without a whole record from the indexes, and tell those that wait for it and the worker that
-- runs it. Returns whether there was anything of it; if not, nothing is written.
local function forget(id)
  local known = redis.call('EXISTS', job_key(id)) == 1
  for _, index in ipairs({ QUEUE, AGES, LEASES, DEAD }) do
    known = known or redis.call('ZSCORE', index, id)
  end
  if not known then return false end
  for _, index in ipairs({ QUEUE, AGES, LEASES, DEAD }) do redis.call('ZREM', index, id) end
  redis.call('DEL', job_key(id), checkpoint_key(id))
  add(TOTALS, 'orphans', 1)
  emit(id, 'failed', LOST)
  redis.call('PUBLISH', PREFIX .. 'cancelled', id)
  redis.call('PUBLISH', PREFIX .. 'ended', id)
  return true
end

local function members(index)
  local set = {}
  for _, id in ipairs(redis.call('ZRANGE', index, 0, -1)) do set[id] = true end
  return set
end

-- Put a job into the indexes of its state, and out of the others. `queued`, `aged` and `leased` are the
-- members of the indexes. A job that runs without a lease is given one, which its worker renews if it lives.
local function place(job, queued, aged, leased)
  local id, waits, runs = job.id, job.state == 'queued', job.state == 'running'
  if queued[id] and not waits then redis.call('ZREM', QUEUE, id) end
  if aged[id] and not waits then redis.call('ZREM', AGES, id) end
  if leased[id] and not runs then redis.call('ZREM', LEASES, id) end
  if waits and not queued[id] then redis.call('ZADD', QUEUE, 0, id) end
  if waits and not aged[id] then redis.call('ZADD', AGES, NOW, id) end
  if runs and not leased[id] then redis.call('ZADD', LEASES, NOW + LEASE, id) end
end

-- Rewrite the number of unfinished jobs of each caller, unless it is as counted.
local function write_unfinished(counts)
  local same, fields, stored = true, {}, redis.call('HGETALL', UNFINISHED)
  for i = 1, #stored, 2 do same = same and whole(stored[i + 1]) == counts[stored[i]] end
  for caller, count in pairs(counts) do
    fields[#fields + 1] = caller
    fields[#fields + 1] = count
  end
  if same and #fields == #stored then return end
  redis.call('DEL', UNFINISHED)
  for i = 1, #fields, 2 do redis.call('HSET', UNFINISHED, fields[i], fields[i + 1]) end
end

-- Count the bytes of the results anew, after one of the three keys that tell of them was lost.
local function recount_results()
  local bytes = 0
  for id in pairs(members(RESULTS)) do
    local size = redis.pcall('STRLEN', PREFIX .. 'result:' .. id)
    if type(size) == 'number' and size > 0 then
      redis.call('HSET', SIZES, id, size)
      bytes = bytes + size
    else
      redis.call('ZREM', RESULTS, id)
    end
  end
  for _, id in ipairs(redis.call('HKEYS', SIZES)) do
    if not redis.call('ZSCORE', RESULTS, id) then redis.call('HDEL', SIZES, id) end
  end
  redis.call('HSET', TOTALS, 'bytes', bytes)
end

local function keep_kinds()
  local removed = 0
  for _, key in ipairs({ QUEUE, AGES, LEASES, FLOWS, DUES, DEAD, RESULTS, WORKERS, CALLBACKS }) do
    removed = removed + keep_kind(key, 'ZCARD')
  end
  for _, key in ipairs({ TOTALS, SIZES, REPORTS, UNFINISHED }) do removed = removed + keep_kind(key, 'HLEN') end
  return removed
end

-- Make the indexes and the counts agree with the records of the jobs in them, whichever of their keys was lost, or
-- replaced by one of another kind. Returns how many of those there were.
local function reconcile()
  local removed = keep_kinds()
  local queued, aged, leased = members(QUEUE), members(AGES), members(LEASES)
  local jobs, rows, unfinished = {}, 0, {}
  for _, index in ipairs({ queued, aged, leased }) do
    for id in pairs(index) do
      local job = jobs[id] or read_record(id)
      if not job then
        forget(id)
      elseif not jobs[id] then
        jobs[id] = job
        place(job, queued, aged, leased)
        if job.state == 'queued' then rows = rows + job.rows end
        if job.state == 'queued' or job.state == 'running' then
          unfinished[job.caller] = (unfinished[job.caller] or 0) + 1
        end
      end
    end
  end
  for _, member in ipairs(redis.call('ZRANGE', DUES, 0, -1)) do
    local job = jobs[string.match(member, '%z' .. string.rep('%d', 15) .. '(.+)$')]
    if not (job and job.state == 'queued' and due_key(job.flow, job.due) .. job.id == member) then
      redis.call('ZREM', DUES, member)
    end
  end
  write_unfinished(unfinished)
  if redis.call('EXISTS', QUEUE) == 0 then
    redis.call('DEL', FLOWS)
    redis.call('HDEL', TOTALS, 'rows', 'clock')
  elseif (whole(redis.call('HGET', TOTALS, 'rows')) or 0) ~= rows then
    redis.call('HSET', TOTALS, 'rows', rows)
  end
  local results = redis.call('ZCARD', RESULTS)
  if redis.call('HLEN', SIZES) ~= results or (results > 0 and not whole(redis.call('HGET', TOTALS, 'bytes'))) then
    recount_results()
  end
  return removed
end

-- Returns a job's record. If it is not whole, removes what is left of the job and returns nil.
local function intact(id)
  local job = read_record(id)
  if not job and forget(id) then reconcile() end
  return job
end

-- The fencing token: true while this owner's attempt is the one that runs the job.
local function holds(job, owner, attempt)
  return job and job.state == 'running' and job.owner == owner and job.attempt == tonumber(attempt)
end

-- True if this owner's attempt ended the job in this state.
local function ended_by(job, state, owner, attempt)
  return job and job.state == state and job.owner == owner and job.attempt == tonumber(attempt)
end

-- `flow` is that of a job that waits for its turn; it is empty for one that goes before its turn.
local function enqueue(id, finish, rows, flow)
  redis.call('ZADD', QUEUE, finish, id)
  redis.call('ZADD', AGES, NOW, id)
  add(TOTALS, 'rows', rows)
  redis.call('PUBLISH', PREFIX .. 'work', flow)
end

-- When the last job leaves, no flow is ahead or behind any more: the virtual clock starts anew.
-- The first write is one that memory pressure cannot refuse. The queue is left last: an index of another kind
-- that ends this before does not hide the job.
local function dequeue(job)
  redis.call('ZREM', AGES, job.id)
  if redis.call('ZSCORE', QUEUE, job.id) then add(TOTALS, 'rows', -job.rows) end
  redis.call('ZREM', DUES, due_key(job.flow, job.due) .. job.id)
  redis.call('ZREM', QUEUE, job.id)
  if redis.call('EXISTS', QUEUE) == 0 then
    redis.call('DEL', FLOWS)
    redis.call('HDEL', TOTALS, 'rows', 'clock')
  end
end

-- A job that had its turn goes back to the head: 0 is before every virtual finish time.
local function put_back(job)
  redis.call('ZREM', LEASES, job.id)
  redis.call('HSET', job_key(job.id), 'state', 'queued', 'returned_at', NOW)
  enqueue(job.id, 0, job.rows, '')
end

-- Add `change` to the number of the caller's jobs that have not ended.
local function count_unfinished(caller, change)
  if add(UNFINISHED, caller, change) <= 0 then redis.call('HDEL', UNFINISHED, caller) end
end

-- Count whether a job with a deadline was done by then. One that ended before, for another reason, counts as
-- neither.
local function count_promise(job, state, data)
  local deadline = tonumber(job.deadline)
  if not deadline then return end
  local late = NOW > deadline
  if state ~= 'done' then
    -- Those who give it up at its deadline may be early by what their clocks differ from this one.
    late = NOW + 100 > deadline or string.find(data, 'deadline-exceeded', 1, true)
    if not late then return end
  end
  add(TOTALS, late and 'broken' or 'kept', 1)
end

-- Have the sender of a job called back, if its request names an address: from now on its outcome is known.
local function call_back(job)
  if not job.callback then return end
  redis.call('HSET', job_key(job.id), 'callback', 'pending', 'called', 0, 'ended_at', NOW)
  redis.call('ZADD', CALLBACKS, NOW, job.id)
end

-- End a job in a terminal state, with its last event.
local function conclude(job, state, kind, data)
  local key = job_key(job.id)
  count_promise(job, state, data)
  count_unfinished(job.caller, -1)
  redis.call('ZREM', LEASES, job.id)
  redis.call('HSET', key, 'state', state)
  if kind ~= 'done' then redis.call('HSET', key, 'error', data) end
  redis.call('PEXPIRE', key, RECORD_TTL)
  redis.call('DEL', checkpoint_key(job.id), holders_key(job.id))
  -- The sender of a job that was withdrawn has been told before.
  if not job.withdrawn then call_back(job) end
  emit(job.id, kind, data)
  redis.call('PUBLISH', PREFIX .. 'ended', job.id)
end

-- Count an attempt that ended with the loss of the worker or in a transient fault. The job is a poison
-- candidate from now on (field `suspect`): it runs alone and from its beginning, because any job that ran
-- beside it may be innocent. Returns 1 if that was the last attempt allowed, and the job is dead; else 0.
local function consume_attempt(job, attempts, dead_ttl, dead_kept, fault)
  local key = job_key(job.id)
  redis.call('ZREM', LEASES, job.id)
  redis.call('HSET', key, 'suspect', 1, 'step', 0)
  redis.call('DEL', checkpoint_key(job.id))
  if add(key, 'spent', 1) < attempts then
    put_back(job)
    emit(job.id, 'queued', fault)
    return 0
  end
  conclude(job, 'dead', 'failed', fault)
  redis.call('PEXPIRE', key, dead_ttl)
  redis.call('ZADD', DEAD, NOW, job.id)
  add(TOTALS, 'dead', 1)
  redis.call('ZREMRANGEBYSCORE', DEAD, '-inf', NOW - dead_ttl)
  redis.call('ZREMRANGEBYRANK', DEAD, 0, -dead_kept - 1)
  return 1
end

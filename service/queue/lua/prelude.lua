-- Prepended to every script: the keys, the clock, and the moves that a job can make. Running it changes
-- nothing.
-- KEYS: `Keys.permanent`, in order. ARGV: prefix, now (ms; empty: this server's clock), record TTL (ms),
-- events kept per job, and then the script's own arguments (ARGS).
local QUEUE, AGES, LEASES, FLOWS, DUES, TOTALS = unpack(KEYS, 1, 6)
local DEAD, RESULTS, SIZES, WORKERS, REPORTS, UNFINISHED = unpack(KEYS, 7, 12)
local PREFIX, RECORD_TTL, EVENTS_KEPT = ARGV[1], tonumber(ARGV[3]), ARGV[4]
local ARGS = { unpack(ARGV, 5) }

local function read_clock()
  if ARGV[2] ~= '' then return tonumber(ARGV[2]) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local NOW = read_clock()

local function job_key(id) return PREFIX .. 'job:' .. id end
local function checkpoint_key(id) return PREFIX .. 'checkpoint:' .. id end

-- Members of DUES sort by flow, and within a flow by when a job is due (ms).
local function due_key(flow, due) return flow .. '\0' .. string.format('%015.0f', due) end

-- Append an event to the job's stream.
local function emit(id, kind, data)
  local stream = PREFIX .. 'events:' .. id
  redis.call('XADD', stream, 'MAXLEN', '~', EVENTS_KEPT, '*', 'kind', kind, 'data', data)
  redis.call('PEXPIRE', stream, RECORD_TTL)
end

-- The fencing token: true while this owner's attempt is the one that runs the job.
local function holds(id, owner, attempt)
  local job = redis.call('HMGET', job_key(id), 'state', 'owner', 'attempt')
  return job[1] == 'running' and job[2] == owner and job[3] == attempt
end

local function enqueue(id, finish, rows)
  redis.call('ZADD', QUEUE, finish, id)
  redis.call('ZADD', AGES, NOW, id)
  redis.call('HINCRBY', TOTALS, 'rows', rows)
  redis.call('PUBLISH', PREFIX .. 'work', '')
end

-- When the last job leaves, no flow is ahead or behind any more: the virtual clock starts anew.
local function dequeue(id, rows)
  redis.call('ZREM', QUEUE, id)
  redis.call('ZREM', AGES, id)
  local job = redis.call('HMGET', job_key(id), 'flow', 'due')
  redis.call('ZREM', DUES, due_key(job[1], job[2]) .. id)
  redis.call('HINCRBY', TOTALS, 'rows', -rows)
  if redis.call('EXISTS', QUEUE) == 0 then
    redis.call('DEL', FLOWS)
    redis.call('HDEL', TOTALS, 'rows', 'clock')
  end
end

-- A job that had its turn goes back to the head: 0 is before every virtual finish time.
local function put_back(id)
  local job = job_key(id)
  redis.call('ZREM', LEASES, id)
  redis.call('HSET', job, 'state', 'queued', 'returned_at', NOW)
  enqueue(id, 0, tonumber(redis.call('HGET', job, 'rows')))
end

-- Add `change` to the number of the caller's jobs that have not ended.
local function count_unfinished(caller, change)
  if redis.call('HINCRBY', UNFINISHED, caller, change) <= 0 then redis.call('HDEL', UNFINISHED, caller) end
end

-- End a job in a terminal state, with its last event.
local function conclude(id, state, kind, data)
  local job = job_key(id)
  count_unfinished(redis.call('HGET', job, 'caller'), -1)
  redis.call('ZREM', LEASES, id)
  redis.call('HSET', job, 'state', state)
  if kind ~= 'done' then redis.call('HSET', job, 'error', data) end
  redis.call('PEXPIRE', job, RECORD_TTL)
  redis.call('DEL', checkpoint_key(id))
  emit(id, kind, data)
  redis.call('PUBLISH', PREFIX .. 'ended', id)
end

-- Count an attempt that ended with the loss of the worker or in a transient fault. The job is a poison
-- candidate from now on (field `suspect`): it runs alone and from its beginning, because any job that ran
-- beside it may be innocent. Returns 1 if that was the last attempt allowed, and the job is dead; else 0.
local function consume_attempt(id, attempts, dead_ttl, dead_kept, fault)
  local job = job_key(id)
  redis.call('HSET', job, 'suspect', 1, 'step', 0)
  redis.call('DEL', checkpoint_key(id))
  if redis.call('HINCRBY', job, 'spent', 1) < attempts then
    put_back(id)
    emit(id, 'queued', fault)
    return 0
  end
  conclude(id, 'dead', 'failed', fault)
  redis.call('PEXPIRE', job, dead_ttl)
  redis.call('ZADD', DEAD, NOW, id)
  redis.call('HINCRBY', TOTALS, 'dead', 1)
  redis.call('ZREMRANGEBYSCORE', DEAD, '-inf', NOW - dead_ttl)
  redis.call('ZREMRANGEBYRANK', DEAD, 0, -dead_kept - 1)
  return 1
end

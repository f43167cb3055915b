-- Prepended to every script: the keys, the clock, and the moves a job can make. Nothing here returns or has a side effect by itself.
-- KEYS: `Keys.permanent`, in order. ARGV: prefix, now (ms; empty = this server's clock), record TTL (ms), events kept per job; then the script's own.
local QUEUE, AGES, LEASES, FLOWS, DUES, TOTALS, DEAD, RESULTS, SIZES, WORKERS, REPORTS, UNFINISHED = unpack(KEYS)
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

-- Members of DUES sort by flow, and within it by when a job is due (ms).
local function due_key(flow, due) return flow .. '\0' .. string.format('%015.0f', due) end

local function emit(id, kind, data)
  local stream = PREFIX .. 'events:' .. id
  redis.call('XADD', stream, 'MAXLEN', '~', EVENTS_KEPT, '*', 'kind', kind, 'data', data)
  redis.call('PEXPIRE', stream, RECORD_TTL)
end

-- The fencing token: true while this owner's attempt is the one that runs the job.
local function holds(id, owner, attempt)
  local held = redis.call('HMGET', job_key(id), 'state', 'owner', 'attempt')
  return held[1] == 'running' and held[2] == owner and held[3] == attempt
end

-- Without waiting jobs nobody is ahead or behind: the virtual clock starts anew.
local function enqueue(id, score, rows)
  redis.call('ZADD', QUEUE, score, id)
  redis.call('ZADD', AGES, NOW, id)
  redis.call('HINCRBY', TOTALS, 'rows', rows)
  redis.call('PUBLISH', PREFIX .. 'work', '')
end

local function dequeue(id, rows)
  redis.call('ZREM', QUEUE, id)
  redis.call('ZREM', AGES, id)
  local place = redis.call('HMGET', job_key(id), 'flow', 'due')
  redis.call('ZREM', DUES, due_key(place[1], place[2]) .. id)
  redis.call('HINCRBY', TOTALS, 'rows', -rows)
  if redis.call('EXISTS', QUEUE) == 0 then
    redis.call('DEL', FLOWS)
    redis.call('HDEL', TOTALS, 'rows', 'clock')
  end
end

-- A job that had its turn goes back to the head: score 0 is before every virtual finish time.
local function put_back(id)
  local job = job_key(id)
  redis.call('ZREM', LEASES, id)
  redis.call('HSET', job, 'state', 'queued', 'returned_at', NOW)
  enqueue(id, 0, tonumber(redis.call('HGET', job, 'rows')))
end

-- One more or one less of the jobs of a caller that have not ended.
local function count_unfinished(caller, change)
  if redis.call('HINCRBY', UNFINISHED, caller, change) <= 0 then redis.call('HDEL', UNFINISHED, caller) end
end

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

-- An attempt that cost the job its worker or ended in a passing fault: whatever ran beside it may be innocent, so from now on it
-- is a suspect, and runs alone and from its beginning. Returns 1 if that was the last attempt allowed.
local function spend(id, attempts, dead_ttl, dead_kept, fault)
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

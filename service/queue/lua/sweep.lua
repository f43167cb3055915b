-- Take jobs back from workers whose lease has ended; each such loss counts as an attempt. Then, at most once in
-- `RECONCILE_EVERY` ms however many workers sweep, look for jobs whose records or indexes were lost: all that
-- some index holds, and of all keys the next few. Returns how many leases ended; -1, and nothing is done, if
-- this server's clock is not what the worker knows it to be: it was set, so that leases that are kept may seem to
-- have ended.
-- ARGS: attempts allowed, dead TTL (ms), dead kept, error, now as the worker knows it (ms), tolerance (ms).
local RECONCILE_EVERY, KEYS_AT_ONCE = 1000, 1000
local attempts, dead_ttl, dead_kept, fault = tonumber(ARGS[1]), tonumber(ARGS[2]), tonumber(ARGS[3]), ARGS[4]

-- Have a job's sender called back although the index lost it, or a worker of an earlier release ended the job.
local function find_callback(id)
  local callback = redis.call('HGET', job_key(id), 'callback')
  local due = callback == 'pending' and not redis.call('ZSCORE', CALLBACKS, id)
  if due or callback == 'waiting' then
    local job = read_record(id)
    if job then call_back(job) end
  end
end

-- Put unfinished jobs that no index holds, among the next keys, into the indexes of their state again. Where this
-- user may not SCAN, only what some index holds is found.
local function find_unindexed()
  local cursor = redis.call('HGET', TOTALS, 'scanned') or '0'
  local page = redis.pcall('SCAN', cursor, 'MATCH', job_key('*'), 'COUNT', KEYS_AT_ONCE)
  redis.call('HSET', TOTALS, 'scanned', page.err and '0' or page[1])
  if page.err then return end
  for _, key in ipairs(page[2]) do
    local state = redis.pcall('HGET', key, 'state')
    if type(state) ~= 'string' or state == 'queued' or state == 'running' then
      local id = string.sub(key, #job_key('') + 1)
      local job = read_record(id)
      local function has(index) return { [id] = redis.call('ZSCORE', index, id) and true or nil } end
      if job then place(job, has(QUEUE), has(AGES), has(LEASES)) else forget(id) end
    else
      find_callback(string.sub(key, #job_key('') + 1))
    end
  end
end

if math.abs(NOW - tonumber(ARGS[5])) > tonumber(ARGS[6]) then return -1 end
local ended = redis.call('ZRANGEBYSCORE', LEASES, '-inf', NOW, 'LIMIT', 0, 256)
for _, id in ipairs(ended) do
  local job = intact(id)
  if job and job.state == 'running' then
    consume_attempt(job, attempts, dead_ttl, dead_kept, fault)
  else
    redis.call('ZREM', LEASES, id)
  end
end
if math.abs(NOW - (whole(redis.call('HGET', TOTALS, 'reconciled')) or 0)) >= RECONCILE_EVERY then
  -- A write that memory pressure cannot refuse comes before those that it can.
  redis.call('ZREM', LEASES, '')
  find_unindexed()
  reconcile()
  redis.call('HSET', TOTALS, 'reconciled', NOW)
end
return #ended

-- Queue a job unless its id is known. Weighted fair queueing, self-clocked (Golestani 1994): a job's virtual finish time is
-- max(clock, its flow's last finish) + rows / weight, and the clock is the finish time of the job claimed last.
-- Returns 1 queued, 0 known, -1 too many jobs, -2 too much work.
local id, wire, nonce, flow, model, deadline = unpack(ARGS, 1, 6)
local weight, rows, samples, job_limit, row_limit = tonumber(ARGS[7]), tonumber(ARGS[8]), ARGS[9], tonumber(ARGS[10]), tonumber(ARGS[11])
local job = job_key(id)

local known = redis.call('HGET', job, 'nonce')
if known then return known == nonce and 1 or 0 end

if redis.call('ZCARD', QUEUE) >= job_limit then return -1 end
local waiting = tonumber(redis.call('HGET', TOTALS, 'rows')) or 0
if waiting > 0 and waiting + rows > row_limit then return -2 end

redis.call('HSET', job, 'nonce', nonce, 'wire', wire, 'state', 'queued', 'model', model, 'samples', samples, 'rows', rows,
  'deadline', deadline, 'attempt', 0, 'spent', 0, 'step', 0)
local clock = tonumber(redis.call('HGET', TOTALS, 'clock')) or 0
local finish = math.max(clock, tonumber(redis.call('ZSCORE', FLOWS, flow)) or 0) + rows / weight
redis.call('ZADD', FLOWS, finish, flow)
enqueue(id, finish, rows)
emit(id, 'queued', ARGS[12])
return 1

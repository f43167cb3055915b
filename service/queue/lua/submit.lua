-- Queue a job unless its id is known. Weighted fair queueing, self-clocked (Golestani 1994): a job's virtual finish time is
-- max(clock, its flow's last finish) + rows / weight, and the clock is the finish time of the job claimed last.
-- Within a flow the earliest deadline goes first: a job that is due before others of its flow starts where the first of them would
-- have, and they finish later by its work, so that other flows are served as before. One without a deadline is due when its
-- patience ends. Returns 1 queued, 0 known, -1 too many jobs, -2 too much work, -3 too many of this caller.
local id, wire, nonce, flow, model, deadline = unpack(ARGS, 1, 6)
local weight, rows, samples, job_limit, row_limit = tonumber(ARGS[7]), tonumber(ARGS[8]), ARGS[9], tonumber(ARGS[10]), tonumber(ARGS[11])
local patience, caller, caller_limit = tonumber(ARGS[12]), ARGS[13], tonumber(ARGS[14])
local job = job_key(id)

local known = redis.call('HGET', job, 'nonce')
if known then return known == nonce and 1 or 0 end

if redis.call('ZCARD', QUEUE) >= job_limit then return -1 end
if caller_limit and (tonumber(redis.call('HGET', UNFINISHED, caller)) or 0) >= caller_limit then return -3 end
local waiting = tonumber(redis.call('HGET', TOTALS, 'rows')) or 0
if waiting > 0 and waiting + rows > row_limit then return -2 end

-- The jobs of this flow that are due later, each moved back by this one's work; and where the first of them would have started: a
-- flow's jobs follow one another, so the first to finish is the first to start.
local function overtaken(due, work)
  local first, finish
  for _, member in ipairs(redis.call('ZRANGEBYLEX', DUES, '[' .. due_key(flow, due + 1), '(' .. flow .. '\1')) do
    local other = string.sub(member, #flow + 17)
    local before = tonumber(redis.call('ZINCRBY', QUEUE, work, other)) - work
    if not finish or before < finish then first, finish = other, before end
  end
  return finish and finish - tonumber(redis.call('HGET', job_key(first), 'rows')) / weight
end

local due, work = tonumber(deadline) or NOW + patience, rows / weight
redis.call('HSET', job, 'nonce', nonce, 'wire', wire, 'state', 'queued', 'model', model, 'samples', samples, 'rows', rows,
  'deadline', deadline, 'flow', flow, 'caller', caller, 'due', due, 'attempt', 0, 'spent', 0, 'step', 0)
local clock = tonumber(redis.call('HGET', TOTALS, 'clock')) or 0
local last = math.max(clock, tonumber(redis.call('ZSCORE', FLOWS, flow)) or 0)
local start = overtaken(due, work)
redis.call('ZADD', FLOWS, last + work, flow)
redis.call('ZADD', DUES, 0, due_key(flow, due) .. id)
enqueue(id, (start or last) + work, rows)
count_unfinished(caller, 1)
emit(id, 'queued', ARGS[15])
return 1

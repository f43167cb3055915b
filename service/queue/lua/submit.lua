-- Queue a job unless its id is known.
-- Returns 1 queued, 0 known, -1 too many jobs, -2 too much work, -3 too many of this caller, -4 an equal job
-- came in between: one of the same `equal` digest ('' has none) other than `seen`, which was looked at before.
--
-- The order is weighted fair queueing, self-clocked (Golestani 1994). A flow is a caller at one priority, and
-- the priority gives its weight. A job's virtual finish time is where its flow's last job finishes, or the
-- virtual clock if that is later, plus rows / weight. Jobs are claimed in the order of their virtual finish
-- times; the clock is that of the job claimed last.
-- Two flows of weight 1, where `a1` has 30 rows and is due in 90 s, `b1` and `b2` have 20 rows each:
--
--   virtual time   0         10        20        30        40
--   flow A         [             a1             ]
--   flow B         [        b1        ][        b2        ]      order: b1 (20), a1 (30), b2 (40)
--
-- Within a flow the earliest deadline goes first; a job without a deadline is due when its patience ends.
-- `a2` of flow A arrives, with 10 rows, due in 60 s. It overtakes a1: it starts where a1 would have started,
-- and a1 finishes 10 later:
--
--   flow A         [   a2   ][             a1             ]
--   flow B         [        b1        ][        b2        ]      order: a2 (10), b1 (20), a1 and b2 (40)
--
-- The other flow keeps its times, and flow A ends at 40, as if a2 had been appended: its turn in the queue is
-- the same.
local id, wire, nonce, flow, model, deadline = unpack(ARGS, 1, 6)
local weight, rows, samples = tonumber(ARGS[7]), tonumber(ARGS[8]), ARGS[9]
local job_limit, row_limit = tonumber(ARGS[10]), tonumber(ARGS[11])
local patience, caller, caller_limit = tonumber(ARGS[12]), ARGS[13], tonumber(ARGS[14])
local equal, seen, equal_ttl, callback = unpack(ARGS, 16, 19)
local equal_key = PREFIX .. 'equal:' .. equal
local job = job_key(id)

local known = intact(id)
if known then return known.nonce == nonce and 1 or 0 end

local other = equal ~= '' and redis.pcall('GET', equal_key)
if type(other) == 'string' and other ~= seen and read_record(other) then return -4 end
if redis.call('ZCARD', QUEUE) >= job_limit then return -1 end
if caller_limit and (whole(redis.call('HGET', UNFINISHED, caller)) or 0) >= caller_limit then return -3 end
local waiting = whole(redis.call('HGET', TOTALS, 'rows')) or 0
if waiting > 0 and waiting + rows > row_limit then return -2 end

-- Returns the jobs of this flow that are due after `due`, and where the first of them would have started, or nil
-- if there is none. The jobs of a flow follow one another, so the first to finish is the first to start.
local function due_later(due)
  local others, start, first_finish = {}, nil, math.huge
  local from, to = '[' .. due_key(flow, due + 1), '(' .. flow .. '\1'
  for _, member in ipairs(redis.call('ZRANGEBYLEX', DUES, from, to)) do
    local other = string.sub(member, #due_key(flow, due) + 1)
    local finish, record = redis.call('ZSCORE', QUEUE, other), intact(other)
    if finish and record then
      others[#others + 1] = other
      finish = tonumber(finish)
      if finish < first_finish then start, first_finish = finish - record.rows / weight, finish end
    end
  end
  return others, start
end

local due, work = tonumber(deadline) or NOW + patience, rows / weight
local others, start = due_later(due)
local last = math.max(finite(redis.call('HGET', TOTALS, 'clock')), finite(redis.call('ZSCORE', FLOWS, flow)))
redis.call('HSET', job, 'nonce', nonce, 'wire', wire, 'state', 'queued', 'model', model, 'samples', samples,
  'rows', rows, 'deadline', deadline, 'flow', flow, 'caller', caller, 'due', due, 'attempt', 0, 'spent', 0,
  'step', 0)
if callback ~= '' then redis.call('HSET', job, 'callback', 'waiting') end
if equal ~= '' then redis.call('SET', equal_key, id, 'PX', equal_ttl) end
-- The new job overtakes those: they finish later by its work.
for _, other in ipairs(others) do redis.call('ZINCRBY', QUEUE, work, other) end
redis.call('ZADD', FLOWS, last + work, flow)
redis.call('ZADD', DUES, 0, due_key(flow, due) .. id)
enqueue(id, (start or last) + work, rows, flow)
count_unfinished(caller, 1)
-- Events of a job of this id that was lost would end those who follow this one.
redis.call('DEL', PREFIX .. 'events:' .. id)
emit(id, 'queued', ARGS[15])
return 1

-- Append events of held jobs; a step also updates its job's record. Returns per event: 1 if the lease still holds,
-- else 0.
-- ARGS: id, owner, attempt, kind, data, step and steps of each event; the last two are empty if it has none.
local held = {}
-- The records are read first: what an index of another kind ends here was not begun, and may be repeated.
for i = 1, #ARGS, 7 do
  held[#held + 1] = holds(intact(ARGS[i]), ARGS[i + 1], ARGS[i + 2]) and 1 or 0
end
for n, verdict in ipairs(held) do
  local id, _, _, kind, data, step, steps = unpack(ARGS, 7 * n - 6, 7 * n)
  if verdict == 1 then
    if step ~= '' then redis.call('HSET', job_key(id), 'step', step) end
    if steps ~= '' then redis.call('HSET', job_key(id), 'steps', steps) end
    emit(id, kind, data)
  end
end
return held

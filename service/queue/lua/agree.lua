-- Agree on a value: the first that is proposed holds, and is forgotten if nobody asks for it in a long time.
-- Returns it; an empty proposal only asks, and the answer is empty while there is none.
local name, proposal, ttl = unpack(ARGS, 1, 3)
local key = PREFIX .. 'agreed:' .. name
-- After a write that memory pressure cannot refuse, none of the script is refused: else no worker could start
-- to drain a queue that fills Redis.
redis.call('ZREM', LEASES, '')
keep_kind(key, 'STRLEN')
local agreed = redis.call('GET', key)
if agreed then
  redis.call('PEXPIRE', key, ttl)
  return agreed
end
if proposal ~= '' then redis.call('SET', key, proposal, 'PX', ttl) end
return proposal

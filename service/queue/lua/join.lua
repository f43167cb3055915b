-- Hold a waiting or running job for a further request, which waits for its images as well: until `holder` leaves
-- (see cancel.lua) the job is not cancelled. Returns 1, or 0 if it has ended, was withdrawn or is unknown.
local id, holder = unpack(ARGS)
local job = intact(id)
if not job or job.withdrawn or (job.state ~= 'queued' and job.state ~= 'running') then return 0 end
keep_kind(holders_key(id), 'SCARD')
redis.call('SADD', holders_key(id), holder)
redis.call('PEXPIRE', holders_key(id), RECORD_TTL)
return 1

-- Remove the indexes of another kind than they should be, and make the others agree with the records of the jobs.
-- Whoever wrote them, the sweep finds the jobs that were in them. Returns how many were removed.
local removed = reconcile()
redis.call('HDEL', TOTALS, 'reconciled', 'scanned')
return removed

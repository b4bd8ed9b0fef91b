-- What wrk sends where a route writes, and what it says at the end: one line of JSON.

local threads = {}

issued = -1 -- wrk asks for one request which it does not send

function setup(thread)
   table.insert(threads, thread)
end

local first_id = tonumber(os.getenv("FIRST_ID"))

if first_id then
   function request()
      issued = issued + 1
      return wrk.format("POST", string.format("/items/%d", first_id + issued))
   end
end

function done(summary, latency)
   local sent = 0
   if first_id then
      for _, thread in ipairs(threads) do
         sent = sent + thread:get("issued")
      end
   end
   local errors = summary.errors
   io.write(string.format(
      '{"answers": %d, "refused": %d, "broken": %d, "late": %d, "issued": %d, ' ..
      '"microseconds": %d, "p50": %d, "p99": %d}\n',
      summary.requests, errors.status, errors.connect + errors.read + errors.write,
      errors.timeout, sent, summary.duration, latency:percentile(50), latency:percentile(99)
   ))
end

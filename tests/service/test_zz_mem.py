import tracemalloc
def run(engine, reqs):
    for r in reqs: engine.add(r)
    while not engine.idle: engine.step()
def test_m(make_engine, make_request, make_rung):
    e=make_engine()
    def live(n):
        for k in range(n): run(e,[make_request(f"{k}-{j}/0",seed=k,rung=make_rung(steps=5)) for j in range(4)])
    tracemalloc.start(5)
    live(5); a=tracemalloc.take_snapshot(); live(40); b=tracemalloc.take_snapshot()
    for st in b.compare_to(a,"lineno")[:8]: print(st)

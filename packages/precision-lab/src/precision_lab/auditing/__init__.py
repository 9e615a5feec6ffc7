"""precision audit: what a training loop really computes and keeps in which dtype.

recorder.py   observes a loop within a `with`
ops.py        every operation, kinds.py: what kind it is
calls.py      the calls that matter: backward, autocast, scaler, scheduler, save
graph.py      what autograd built
sample.py     what a step changed
stored.py     what lives on from step to step
names.py, where.py  what and where the user calls it
record.py     all that was seen
"""

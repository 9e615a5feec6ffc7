"""precision audit: what a training loop really computes and keeps in which dtype.

recorder.py   observes a loop within a `with`
hooks.py      modules and optimizers
ops.py        every operation, kinds.py: what kind it is
calls.py      the calls that matter: backward, autocast, scaler, scheduler, save
graph.py      what autograd built
sample.py     what a step changed
stored.py     what lives on from step to step
names.py, where.py  what and where the user calls it
asked.py      what the script asked its library for
record.py     all that was seen

ledger.py     which dtype each part was observed in
observed.py   the same as a policy: which mode of ours that is
finding.py, rules.py, rules_*.py  what is wrong, and what to do
report.py     all of it; shown.py: on a terminal, page.py: as a page

context.py    around a loop, script.py: around a script, command.py: from the command line
"""

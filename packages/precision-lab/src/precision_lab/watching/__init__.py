"""precision watch: a sentinel around a training loop, made of what a step computes anyway.

context.py    what `precision_lab.watch` takes
watch.py      the context: hooks that come and go
steps.py      what belongs to one step, whatever the loop's order is
calls.py      the calls of torch that are replaced meanwhile
values.py     numbers on a device, read without waiting for it
alarms.py     what is wrong enough to be told; spikes.py: a loss that jumps
batch.py      the last batch, kept for a replay; kept.py: what a step began with, where that is asked for
replay.py     asks `explaining` for the operation
probes.py     a few gradients that each step is judged by
health.py     every so many steps: modules, gradients and updates
sampled.py    what they gave, as a line
shares.py     what a sample of values says: zeros, subnormals, and what other formats would do to it
unchanged.py  updates that round to nothing
output.py     where all of it goes; lines.py: the file, described.py: its first line, boards.py: TensorBoard and W&B
"""

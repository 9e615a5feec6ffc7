"""precision why: the operation by which a training step first goes wrong, and what mends it.

explain.py      runs the step once more and draws the conclusion
replay.py       forward and backward of the model, which is afterwards as it was
watched.py      every operation of them: which first gave inf or NaN, and of what
numbers.py      what the values of a tensor are like
stored.py       a batch, a parameter, a buffer that was not finite before
trace.py        from a result that is not finite back to where that began
causes.py       which kind of mistake an operation made
loss.py         the graph of a loss that was computed outside of the model
underflow.py    gradients that are zero in the format and are not in float64
rounding.py     outputs that are far from what float64 gives
optimizers.py   what an optimizer holds that is not finite, or made so; before.py: its step once more, on copies
swallowed.py    updates that round to nothing
sharded.py      what one rank sees of a sharded model, without the others

wide.py         runs modules in a wider dtype, or one operation with its operands mended
remedies.py     tries what mends it; mends.py: operands that make an operation finite

explanation.py  what was found; shown.py: on a terminal
files.py        files of `precision watch`, of one rank or several; ranks.py: which rank was first
symptoms.py     the same question to a file of `precision watch`, command.py: from the command line
"""

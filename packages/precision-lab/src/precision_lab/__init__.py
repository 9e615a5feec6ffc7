"""precision-lab: the `precision` command, which trains one small model in every number format and compares.

    cli.py        the command and its options
    modes.py      --modes: which precisions to run
    slow.py       which of them this device can only run slowly
    compare.py    runs them one after another and collects a row for each
    process.py    one child process, and the lines it sends
    progress.py   what is shown meanwhile, on a terminal and in a log
    results.py    a row, and what is computed from all of them
    table.py      the table at the end
    plot.py       the picture

    train.py      what the child does: one training run in one precision
    gpt.py        the model
    text.py       the text
    memory.py     what it took

Nothing is imported here, so that `precision --help` need not wait for torch.
"""

"""precision-lab: the `precision` command: which number formats run here, and what they do to training.

    cli.py        the commands and their options

    doctor.py     precision doctor: everything that there is to say of this machine
    machine.py    its CPU and devices
    installed.py  packages, and what is wrong with them
    findings.py   all of it, printed

    modes.py      precision compare --modes: which precisions to run
    rows.py       a row for each, and which of them run here
    compare.py    runs them one after another and fills the rows in
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

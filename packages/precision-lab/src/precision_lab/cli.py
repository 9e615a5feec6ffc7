"""The `precision` command."""

from __future__ import annotations

import click

from precision_lab.commands.audit import audit
from precision_lab.commands.choose import choose
from precision_lab.commands.compare import compare
from precision_lab.commands.doctor import doctor
from precision_lab.commands.estimate import estimate
from precision_lab.commands.new import new
from precision_lab.commands.why import why


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="precision-lab")
def main() -> None:
    """Find out which number formats run here, and what they do to training, by measuring it."""


for command in (compare, estimate, choose, audit, why, new, doctor):
    main.add_command(command)

if __name__ == "__main__":
    main()

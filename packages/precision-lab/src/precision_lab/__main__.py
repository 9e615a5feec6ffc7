"""`python -m precision_lab`: the command `precision`, where scripts are not on the path."""

from precision_lab.cli import main

raise SystemExit(main())

"""The commands of `precision`, a file each.

Each imports what it needs when it runs: torch takes seconds, --help should not.
"""

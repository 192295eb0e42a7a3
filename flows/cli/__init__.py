"""The commands of `capture2mesh`, one module for each group, and the conventions that they share.

`flows/__main__.py` assembles them. Each command imports flows and `tasks` when it runs: `--help` loads none of them.
"""

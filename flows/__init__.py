"""The flows and the commands: what runs, read as sentences, one Prefect flow in each module.

Workers and the command line start them. They import `tasks`; `tasks` never imports them.
"""

"""Datasets: the plan of what is to be done, the upload as the unit of work, and the report with its rows and page.

The flows import it. It imports `tasks.mesh` and everything below, never a flow.
"""
